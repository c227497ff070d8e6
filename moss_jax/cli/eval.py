"""Measure a system on your own files; a table comes out.

  moss-jax eval pairs STORIES.jsonl --model FOLDER -o OUT          which ending is likelier (StoryCloze), text or speech
  moss-jax eval choice QUESTIONS.csv --model FOLDER -o OUT         multiple choice (MMLU, CMMLU), --shots N
  moss-jax eval spoken-qa QUESTIONS.jsonl --model FOLDER -o OUT    is the answer in the reply, written or spoken
  moss-jax eval resynthesis SPEECH.jsonl --model FOLDER -o OUT     word error rate of recording -> codes -> sound
  moss-jax eval nano --model FOLDER -o OUT                         the report on nano: frozen items, ceiling, controls
  moss-jax eval tokenizer RUN SPEECH.jsonl                         word error rate of a speech tokenizer's training

`moss-jax eval TASK --help` shows the format of the file. OUT is a folder: results.jsonl with a line an item, table.md,
table.json, and the sound that was made. The same command goes on where an interrupted run stopped. The table has the
number of items and the 95% interval of every figure.
"""

from moss_jax.arguments import check_seed, check_whole
from moss_jax.cli.system_arguments import add_system_arguments, progress, system_folder

TASKS = {
    "pairs": """Which ending of a story does the model find likelier? In text, in speech, or mixed.

  moss-jax eval pairs STORIES.jsonl --model FOLDER -o OUT

A line of STORIES.jsonl:
  {"context": "He was hungry.", "endings": ["He ate.", "He slept."], "answer": 0, "group": "tSC"}
  {"context": {"audio": "c.wav"}, "endings": [{"audio": "a.wav"}, {"codes": [17, 3]}], "answer": 1}
"answer" is the place of the right ending, from 0; "group" (a row of the table) and "id" may be left out. Files are
looked for beside STORIES.jsonl. Lower loss on the ending wins, by sum and by mean.
""",
    "choice": """Multiple-choice questions in text: which letter does the model say next?

  moss-jax eval choice mmlu/test/ --shots 5 --examples mmlu/dev/ --model FOLDER -o OUT
  moss-jax eval choice QUESTIONS.jsonl --model FOLDER -o OUT

A .csv has MMLU's columns (question, four choices, letter) or a heading as in CMMLU (Question, A, B, C, D, Answer); its
subject is the file's name. A line of a .jsonl is
  {"question": "2 + 2?", "choices": ["3", "4"], "answer": "B", "subject": "sums"}
with the answer as a letter or as a place from 0. A folder stands for all such files in it.
""",
    "spoken-qa": """Is the answer in the reply? Questions spoken or written, replies written or spoken.

  moss-jax eval spoken-qa QUESTIONS.jsonl --reply text --model FOLDER -o OUT
  moss-jax eval spoken-qa QUESTIONS.jsonl --judge whisper-large-v3/ --model FOLDER -o OUT
  moss-jax eval spoken-qa QUESTIONS.jsonl --judge-command 'asr --file {wav}' --model FOLDER -o OUT

A line of QUESTIONS.jsonl:
  {"question": {"audio": "q.wav"}, "answers": ["Paris", "City of Paris"], "group": "WebQA"}
A spoken reply is transcribed by the judge first: a folder with a speech recogniser of Hugging Face transformers, or any
command that prints what it hears. A reply is right when the words of an answer stand in it side by side; case,
punctuation and articles do not count. Name every spelling, such as "4" and "four".
""",
    "resynthesis": """Word error rate of recording -> codes -> sound -> judge, beside the judge's own on the recordings.

  moss-jax eval resynthesis SPEECH.jsonl --judge-command 'asr --file {wav}' --model FOLDER -o OUT

A line of SPEECH.jsonl: {"audio": "a.wav", "text": "what is said in it"}. It measures the whole codec, voice included,
and is not the paper's protocol, which trains a recogniser on the codes.
""",
    "nano": """The report on nano: spoken and written questions of its domain, all four ways, with ceiling and controls.

  moss-jax eval nano --model FOLDER -o OUT
  moss-jax eval nano --model FOLDER -o OUT --sets voices phrasings --ways ss st --items 50

The items are frozen in the package and spoken by espeak-ng; the judge is pocketsphinx with a closed grammar
(pip install 'moss-jax[judge,espeak]'). Any system can be measured. docs/nano.md explains each row.
""",
    "tokenizer": """Word error rate of the recogniser that a speech tokenizer was trained with, from its codes.

  moss-jax eval tokenizer nano/runs/speech_tokenizer nano/report/items/voices.jsonl

RUN is the folder of the training; its newest checkpoint is measured. A line of SPEECH.jsonl has "audio" and "text".
""",
}


def add_arguments(parser):
    import argparse

    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for task, text in TASKS.items():
        own = tasks.add_parser(
            task, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if task == "tokenizer":
            own.add_argument("folder", metavar="RUN", help="of the training")
            own.add_argument("files", nargs="+", metavar="SPEECH.jsonl", help="recordings and what is said in them")
            continue
        if task != "nano":
            own.add_argument("file", metavar="FILE", help="the items")
        add_system_arguments(own)
        own.add_argument("-o", "--out", required=True, metavar="OUT", help="a folder, new or of the same evaluation")
        own.add_argument("--batch-size", type=int, default=8, help="items at a time, default 8")
        own.add_argument("--fsdp", type=int, default=1, help="devices that share the parameters, default 1")
        own.add_argument("--tensor", type=int, default=1, help="devices that share each layer, default 1")
        if task == "nano":
            own.add_argument(
                "--sets", nargs="+", metavar="SET", help="voices, phrasings, both, seen, two-turn, sentences"
            )
            own.add_argument(
                "--ways", nargs="+", metavar="WAY", help="ss, st, ts, tt: question and answer, s is spoken"
            )
            own.add_argument("--items", type=int, help="so many of each set, default all")
        if task == "choice":
            own.add_argument("--shots", type=int, default=0, help="answered examples before each question, default 0")
            own.add_argument("--examples", metavar="FILE", help="where they are taken from, the first ones a subject")
        if task in ("spoken-qa", "resynthesis"):
            own.add_argument("--judge", metavar="FOLDER", help="a speech recogniser saved by transformers")
            own.add_argument("--judge-command", metavar="COMMAND", help="a program; {wav} stands for the file's name")
            own.add_argument("--voice", help="a name in the system, or a file that `moss-jax voice` wrote")
            own.add_argument("--seed", type=int, default=0, help="default 0")
        if task == "spoken-qa":
            own.add_argument("--reply", default="speech", help="speech (default) or text")
            own.add_argument("--max-new-tokens", type=int, default=500, help="rows of a reply at most, default 500")
            own.add_argument("--sample", action="store_true", help="draw as `moss-jax chat` does, not the likeliest")


def run(args) -> int:
    from moss_jax.evaluate import choice, pairs, resynthesis, spoken_qa
    from moss_jax.evaluate.judge import open_judge
    from moss_jax.evaluate.model import EvaluatedModel

    if args.task == "tokenizer":
        from moss_jax.evaluate.recognition import recognition

        print(recognition(args.folder, args.files, progress))
        return 0
    check_whole("--batch-size", args.batch_size, 1)
    if args.task in ("spoken-qa", "resynthesis"):
        check_seed(args.seed, "--seed")
    judge = None
    if args.task == "resynthesis" or (args.task == "spoken-qa" and args.reply != "text"):
        judge = open_judge(args.judge, args.judge_command)
    model = EvaluatedModel(system_folder(args), fsdp=args.fsdp, tensor=args.tensor, batch_size=args.batch_size)
    if args.task == "nano":
        from moss_jax.recipes.nano import report

        some = {name: getattr(args, name) for name in ("sets", "ways") if getattr(args, name) is not None}
        print(report.run(model, args.out, **some, limit=args.items, say=progress), end="")
        return 0
    common = {"model": model, "file": args.file, "out": args.out, "say": progress}
    if args.task == "pairs":
        table = pairs.run(**common)
    elif args.task == "choice":
        table = choice.run(**common, shots=args.shots, examples=args.examples)
    elif args.task == "spoken-qa":
        sampling = {"greedy": not args.sample, "max_new_tokens": args.max_new_tokens}
        table = spoken_qa.run(
            **common, reply=args.reply, judge=judge, voice=args.voice, seed=args.seed, sampling=sampling
        )
    else:
        table = resynthesis.run(**common, judge=judge, voice=args.voice, seed=args.seed)
    print(table, end="")
    return 0
