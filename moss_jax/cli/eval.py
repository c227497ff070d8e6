"""Evaluate a system on your own files.

  moss-jax eval pairs STORIES.jsonl --model FOLDER -o OUT          likelier story ending (StoryCloze), text or speech
  moss-jax eval choice QUESTIONS.csv --model FOLDER -o OUT         multiple choice (MMLU, CMMLU), --shots N
  moss-jax eval spoken-qa QUESTIONS.jsonl --model FOLDER -o OUT    accuracy of written or spoken replies
  moss-jax eval resynthesis SPEECH.jsonl --model FOLDER -o OUT     word error rate after encoding and decoding
  moss-jax eval nano --model FOLDER -o OUT                         the report on nano: frozen items, ceiling, controls
  moss-jax eval tokenizer RUN SPEECH.jsonl                         word error rate of a speech tokenizer's training

`moss-jax eval TASK --help` describes the file formats. Prints a table. The folder OUT gets results.jsonl with one line
per item, table.md, table.json, and the generated audio. The table has the number of items and the 95% interval of every
figure. If interrupted, rerun the same command to resume.
"""

import argparse
from typing import Any

from moss_jax.arguments import check_seed, check_whole
from moss_jax.cli.system_arguments import add_system_arguments, progress, system_folder

TASKS = {
    "pairs": """Measure how often the model finds the right ending of a story likelier; text, speech or mixed.

  moss-jax eval pairs STORIES.jsonl --model FOLDER -o OUT

A line of STORIES.jsonl:
  {"context": "He was hungry.", "endings": ["He ate.", "He slept."], "answer": 0, "group": "tSC"}
  {"context": {"audio": "c.wav"}, "endings": [{"audio": "a.wav"}, {"codes": [17, 3]}], "answer": 1}
"answer" is the index of the right ending, from 0. "group" (a row of the table) and "id" are optional. File names are
relative to STORIES.jsonl. The ending with the lower loss is chosen, by sum and by mean over its tokens.
""",
    "choice": """Measure the accuracy on multiple-choice questions in text, by the likeliest next letter.

  moss-jax eval choice mmlu/test/ --shots 5 --examples mmlu/dev/ --model FOLDER -o OUT
  moss-jax eval choice QUESTIONS.jsonl --model FOLDER -o OUT

A .csv file has the columns of MMLU (question, four choices, letter), or a header as in CMMLU (Question, A, B, C, D,
Answer); its name is the subject. A line of a .jsonl file is
  {"question": "2 + 2?", "choices": ["3", "4"], "answer": "B", "subject": "sums"}
where the answer is a letter or an index from 0. For a folder, all such files in it are read.
""",
    "spoken-qa": """Measure how often the answer is in the reply; questions and replies are spoken or written.

  moss-jax eval spoken-qa QUESTIONS.jsonl --reply text --model FOLDER -o OUT
  moss-jax eval spoken-qa QUESTIONS.jsonl --judge whisper-large-v3/ --model FOLDER -o OUT
  moss-jax eval spoken-qa QUESTIONS.jsonl --judge-command 'asr --file {wav}' --model FOLDER -o OUT

A line of QUESTIONS.jsonl:
  {"question": {"audio": "q.wav"}, "answers": ["Paris", "City of Paris"], "group": "WebQA"}
Spoken replies are first transcribed by the judge: a folder with a speech recogniser of Hugging Face transformers, or
any command that prints the recognised text. A reply is right if it contains the words of an answer, consecutively;
case, punctuation and articles are ignored. List every spelling, such as "4" and "four".
""",
    "resynthesis": """Measure the word error rate of recordings that were encoded and decoded, and of the originals.

  moss-jax eval resynthesis SPEECH.jsonl --judge-command 'asr --file {wav}' --model FOLDER -o OUT

A line of SPEECH.jsonl: {"audio": "a.wav", "text": "its transcript"}. This evaluates the whole codec including the
voice. It is not the protocol of the paper, which trains a recogniser on the codes.
""",
    "nano": """Produce the report on nano: spoken and written questions of its domain, with ceiling and controls.

  moss-jax eval nano --model FOLDER -o OUT
  moss-jax eval nano --model FOLDER -o OUT --sets voices phrasings --ways ss st --items 50

The items are frozen in the package and spoken by espeak-ng; the judge is pocketsphinx with a closed grammar
(pip install 'moss-jax[judge,espeak]'). Any system can be evaluated. docs/nano.md explains the rows of the report.
""",
    "tokenizer": """Measure the word error rate of the recogniser that a speech tokenizer was trained with.

  moss-jax eval tokenizer nano/runs/speech_tokenizer nano/report/items/voices.jsonl

RUN is the folder of the training; its newest checkpoint is evaluated. A line of SPEECH.jsonl has "audio" and "text".
""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for task, text in TASKS.items():
        subparser = tasks.add_parser(
            task, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if task == "tokenizer":
            subparser.add_argument("folder", metavar="RUN", help="the folder of the training")
            subparser.add_argument("files", nargs="+", metavar="SPEECH.jsonl", help="recordings with transcripts")
            continue
        if task != "nano":
            subparser.add_argument("file", metavar="FILE", help="the items")
        add_system_arguments(subparser)
        subparser.add_argument(
            "-o", "--out", required=True, metavar="OUT", help="a new folder, or that of the same evaluation to resume"
        )
        subparser.add_argument("--batch-size", type=int, default=8, help="items per batch (default: 8)")
        subparser.add_argument("--fsdp", type=int, default=1, help="devices that shard the parameters (default: 1)")
        subparser.add_argument("--tensor", type=int, default=1, help="devices that shard each layer (default: 1)")
        if task == "nano":
            subparser.add_argument(
                "--sets",
                nargs="+",
                metavar="SET",
                help="some of voices, phrasings, both, seen, two-turn, sentences (default: all)",
            )
            subparser.add_argument(
                "--ways",
                nargs="+",
                metavar="WAY",
                help="some of ss, st, ts, tt: question and answer, spoken or text (default: all)",
            )
            subparser.add_argument("--items", type=int, metavar="N", help="number of items per set (default: all)")
        if task == "choice":
            subparser.add_argument("--shots", type=int, default=0, help="examples before each question (default: 0)")
            subparser.add_argument("--examples", metavar="FILE", help="source of the examples, the first per subject")
        if task in ("spoken-qa", "resynthesis"):
            subparser.add_argument(
                "--judge", metavar="FOLDER", help="a speech recogniser in the format of Hugging Face transformers"
            )
            subparser.add_argument(
                "--judge-command", metavar="COMMAND", help="a command that prints the text; {wav} is the file name"
            )
            subparser.add_argument("--voice", help="a name in the system, or a file from `moss-jax voice`")
            subparser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
        if task == "spoken-qa":
            subparser.add_argument("--reply", default="speech", help="kind of reply: speech or text (default: speech)")
            subparser.add_argument(
                "--max-new-tokens", type=int, default=500, help="maximum length of a reply in rows (default: 500)"
            )
            subparser.add_argument(
                "--sample", action="store_true", help="sample as `moss-jax chat` does, instead of greedy decoding"
            )


def run(args: argparse.Namespace) -> int:
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

        selection = {name: getattr(args, name) for name in ("sets", "ways") if getattr(args, name) is not None}
        print(report.run(model, args.out, **selection, limit=args.items, say=progress), end="")
        return 0
    common: dict[str, Any] = {"model": model, "file": args.file, "out": args.out, "say": progress}
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
        assert judge is not None  # opened above for this task
        table = resynthesis.run(**common, judge=judge, voice=args.voice, seed=args.seed)
    print(table, end="")
    return 0
