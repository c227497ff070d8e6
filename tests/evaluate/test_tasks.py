"""The tasks on a tiny random system: results, errors, and resuming after a kill."""

import json
import shutil

import numpy as np
import pytest

from moss_jax.cli import main
from moss_jax.errors import MossError
from moss_jax.evaluate import choice, pairs, resynthesis, spoken_qa
from moss_jax.evaluate.items import ContentPart
from moss_jax.evaluate.judge import CommandJudge, open_judge
from moss_jax.evaluate.results import Results
from tests.evaluate.conftest import tone


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Written, spoken and mixed ones, of different lengths."""
    folder = tmp_path_factory.mktemp("stories")
    sound = {
        name: {"audio": tone(folder / f"{name}.wav", seconds, pitch)}
        for name, seconds, pitch in (("c", 1.0, 200), ("a", 0.4, 300), ("b", 0.9, 900))
    }
    rng = np.random.default_rng(0)
    lines = [
        {"context": "He was hungry.", "endings": ["He ate.", "He slept for a whole week."], "answer": 0, "group": "t"},
        {"context": sound["c"], "endings": [sound["a"], sound["b"]], "answer": 1, "group": "s"},
        {"context": sound["c"], "endings": ["One.", "Two, then three."], "answer": 0, "group": "st", "id": "mixed"},
        {"context": "Then he said", "endings": [sound["a"], {"codes": [1, 2, 3]}], "answer": 0, "group": "ts"},
    ]
    for _ in range(9):
        endings = ["".join(rng.choice(list("abcd "), n)) + "." for n in rng.integers(3, 70, 2)]
        lines.append({"context": "x" * int(rng.integers(1, 60)), "endings": endings, "answer": int(rng.integers(2))})
    return write(folder / "stories.jsonl", lines)


def test_pairs(model, stories, tmp_path):
    table = pairs.run(model, stories, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert (tmp_path / "out" / "table.md").read_text() == table
    assert [row["items"] for row in rows[:2]] == [13, 13] and (rows[0]["what"], rows[1]["compared by"]) == (
        "all",
        "mean",
    )
    assert {row["what"] for row in rows} == {"all", "t", "s", "st", "ts"}
    records = {r["id"]: r for r in map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines()[1:])}
    assert records["00001"]["rows"] == [
        len(model.text_tokenizer.encode(f" {e}")) for e in ("He ate.", "He slept for a whole week.")
    ]
    assert records["00002"]["rows"] == [5, 12] and records["00004"]["rows"] == [5, 3]
    for story in pairs.read_stories(stories):
        record = records[story.name]
        assert record["right"]["sum"] == (np.argmax(record["sums"]) == story.answer)
        means = np.array(record["sums"]) / record["rows"]
        assert record["right"]["mean"] == (np.argmax(means) == story.answer)


def test_a_spoken_context_and_ending_are_one_segment(model):
    config = model.config
    parts = [ContentPart(codes=(1, 2)), ContentPart(codes=(3, 4, 5)), ContentPart(text="no")]
    codes = {part: np.array(part.codes, np.int32) for part in parts[:2]}
    rows, scored = (getattr(pairs.passage(*parts[:2], codes, None, config), name) for name in ("rows", "scored"))
    assert rows[:, 1].tolist() == [config.audio_pad_id, 1, 2, 3, 4, 5, config.eosp_id]
    assert rows[scored, 1].tolist() == [3, 4, 5]
    mixed = pairs.passage(parts[2], parts[1], codes, model.text_tokenizer, config)
    assert mixed.rows[:, 0].tolist()[:3] == [*model.text_tokenizer.encode("no"), config.sosp_id]
    assert mixed.rows[mixed.scored, 1].tolist() == [3, 4, 5]


@pytest.mark.parametrize("cut", [0, 3, 40])
def test_an_interrupted_run_gives_the_same_table(model, stories, tmp_path, cut, monkeypatch):
    whole = pairs.run(model, stories, tmp_path / "whole")
    kept = (tmp_path / "whole" / "results.jsonl").read_bytes()
    lines = kept.splitlines(keepends=True)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "results.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:cut])
    redone = []
    original = type(model.scorer).likelihoods
    monkeypatch.setattr(
        type(model.scorer), "likelihoods", lambda self, g: (redone.append(len(g)), original(self, g))[1]
    )
    assert pairs.run(model, stories, tmp_path / "again") == whole
    assert redone == [8]
    assert sorted((tmp_path / "again" / "results.jsonl").read_bytes().splitlines()) == sorted(kept.splitlines())
    assert pairs.run(model, stories, tmp_path / "again") == whole  # nothing is left to do


@pytest.mark.slow
def test_a_killed_run(stories, folder, tmp_path):
    """SIGKILL after the first results are there; the command again gives the table of an undisturbed run."""
    import os
    import signal
    import subprocess
    import sys
    import time

    shutil.copytree(stories.parent, tmp_path / "data")
    file = tmp_path / "data" / stories.name
    out = tmp_path / "killed"
    arguments = ["eval", "pairs", str(file), "--model", str(folder), "--batch-size", "1"]
    command = [sys.executable, "-m", "moss_jax", *arguments, "-o", str(out)]
    process = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    results = out / "results.jsonl"
    while process.poll() is None and not (results.exists() and results.read_bytes().count(b"\n") > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = results.read_bytes().count(b"\n") - 1
    assert 2 <= finished < 13
    assert main([*arguments, "-o", str(out)]) == 0
    assert main([*arguments, "-o", str(tmp_path / "undisturbed")]) == 0
    assert (out / "table.md").read_text() == (tmp_path / "undisturbed" / "table.md").read_text()


def test_a_second_evaluation_in_the_same_folder_is_refused(model, stories, tmp_path):
    with Results(tmp_path / "out", {"task": "x"}), pytest.raises(MossError, match="another evaluation is writing"):
        Results(tmp_path / "out", {"task": "x"})
    Results(tmp_path / "out", {"task": "x"}).close()


def test_results_of_another_evaluation_are_not_overwritten(model, stories, tmp_path):
    pairs.run(model, stories, tmp_path / "out")
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    shutil.copytree(stories.parent, tmp_path / "data")
    other = tmp_path / "data" / stories.name
    other.write_text(other.read_text().replace("hungry", "thirsty"))
    with pytest.raises(MossError, match=r"results of another evaluation \(file: there"):
        pairs.run(model, other, tmp_path / "out")
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    (tmp_path / "out" / "results.jsonl").write_bytes(before.replace(b'{"id"', b'{"di"', 1))
    with pytest.raises(MossError, match="line 2: damaged"):
        pairs.run(model, stories, tmp_path / "out")


def test_all_wrong_lines_are_reported(tmp_path):
    lines = [
        '{"context": "a", "endings": ["b", "c"], "answer": 0}',
        '{"context": "a", "endings": ["b"], "answer": 0}',
        "{broken",
        '{"context": "a", "endings": ["b", {"audio": "none.wav"}], "answer": 0}',
        '{"context": "a", "endings": ["b", "c"], "answer": 2}',
        '{"context": "a", "endings": ["b", "c"], "answer": 0, "id": "00001"}',
        '{"context": "a", "endings": ["b", "c"], "answer": 0, "hint": 1}',
        "7",
        '{"context": "a", "endings": ["b", {"codes": [-1]}], "answer": 0}',
        '{"context": "a", "endings": ["b", {"codes": [1]}], "answer": 0}',
        '{"context": {"codes": [3, 256]}, "endings": ["b", "c"], "answer": 0}',
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(MossError) as error:
        pairs.read_stories(path, 256)
    head, *rest = str(error.value).splitlines()
    assert head.endswith("bad.jsonl: 10 lines are wrong")
    assert [line.strip().split(":")[0] for line in rest] == [f"line {n}" for n in range(2, 12)]


def test_choice(model, tmp_path):
    questions = tmp_path / "sums_test.csv"
    questions.write_text('"What is 2 + 2,\nplease?",3,4,5,6,B\n1 + 1?,2,3,4,5,A\n')
    examples = tmp_path / "dev"
    examples.mkdir()
    write(
        examples / "x.jsonl",
        [
            {"question": f"{i}?", "choices": list("wxyz"), "answer": i, "subject": s}
            for i in range(3)
            for s in ("sums", "birds")
        ],
    )
    table = choice.run(model, questions, tmp_path / "out", shots=2, examples=examples)
    assert "| all | 2 |" in table
    read = choice.read_choice_questions(questions)
    assert [q.name for q in read] == ["00001", "00003"] and read[0].subject == "sums"
    text = choice.prompt(read[1], choice.read_choice_questions(examples)[:1])
    assert text == (
        "The following are multiple choice questions (with answers) about sums.\n\n0?\nA. w\nB. x\nC. y\nD. z\n"
        "Answer: A\n\n1 + 1?\nA. 2\nB. 3\nC. 4\nD. 5\nAnswer:"
    )
    with pytest.raises(MossError, match="fewer than 4 examples of: sums"):
        choice.run(model, questions, tmp_path / "other", shots=4, examples=examples)


def test_choice_files(tmp_path):
    header = tmp_path / "cmmlu.csv"
    header.write_text("\ufeff,Question,A,B,C,D,Answer\n0,问题,一,二,三,四,C\n")
    (only,) = choice.read_choice_questions(header)
    assert (only.question, only.choices, only.answer) == ("问题", ("一", "二", "三", "四"), 2)
    bad = tmp_path / "bad.csv"
    bad.write_text("q,a,b,c,d,E\nq,a\n\nq,a,b,c,d,A\n,a,b,c,d,A\n")
    with pytest.raises(MossError) as error:
        choice.read_choice_questions(bad)
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == ["line 1", "line 2", "line 5"]
    with pytest.raises(MossError) as error:
        choice.read_choice_questions(tmp_path)
    assert "bad.csv: 3 lines" in str(error.value)


@pytest.mark.slow
def test_spoken_questions_are_judged_by_a_command(model, tmp_path, judge_command):
    command, judged_log = judge_command
    clip = tone(tmp_path / "q.wav", 0.8)
    lines = [
        {"question": {"audio": clip}, "answers": ["Paris", "City of Paris"], "group": "A"},
        {"question": "And in writing?", "answers": ["London"], "group": "B"},
        {"question": {"codes": [1, 2, 3]}, "answers": ["the paris"], "group": "A"},
        {"question": {"codes": [4]}, "answers": ["Rome", "Pari"], "group": "B"},
    ]
    questions = write(tmp_path / "qa.jsonl", lines)
    sampling = {"greedy": False, "max_new_tokens": 9, "min_new_tokens": 9}
    options = {"judge": CommandJudge(command), "sampling": sampling}
    table = spoken_qa.run(model, questions, tmp_path / "out", **options)
    assert "| all | 4 | 2 | 50.0 |" in table and "| B | 2 | 0 |" in table and "Cut off by max_new_tokens: 4" in table
    waves = [str(tmp_path / "out" / "waves" / f"{i:05d}.wav") for i in (1, 2, 3, 4)]
    assert judged_log.read_text().split() == waves
    whole = (tmp_path / "out" / "results.jsonl").read_text()
    (tmp_path / "out" / "results.jsonl").write_text(whole.splitlines(keepends=True)[0] + '{"id": "000')
    assert spoken_qa.run(model, questions, tmp_path / "out", **options) == table
    assert (tmp_path / "out" / "results.jsonl").read_text() == whole
    assert judged_log.read_text().split() == waves * 2


def test_written_replies_need_no_judge(model, tmp_path):
    questions = write(tmp_path / "qa.jsonl", [{"question": "Say something.", "answers": ["x"]}] * 8)
    options = {"reply": "text", "sampling": {"greedy": False, "max_new_tokens": 9}}
    spoken_qa.run(model, questions, tmp_path / "out", **options)
    replies = [json.loads(line)["said"] for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()[1:]]
    assert len(set(replies)) == 8  # each question has draws of its own
    (tmp_path / "again").mkdir()
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "again" / "results.jsonl").write_text("".join(lines[:5]))
    spoken_qa.run(model, questions, tmp_path / "again", **options)
    assert (tmp_path / "again" / "results.jsonl").read_text() == "".join(lines)  # and keeps them
    with pytest.raises(MossError, match="need a judge"):
        spoken_qa.run(model, questions, tmp_path / "out")


@pytest.mark.slow
def test_resynthesis(model, tmp_path, judge_command):
    lines = [
        {"audio": tone(tmp_path / "a.wav", 0.8), "text": "I think it is Paris!"},
        {"audio": tone(tmp_path / "b.wav", 0.3), "text": "A SHORT"},
        {"codes": [1] * 10, "text": "it is Paris", "words": [[0, 0.2]]},
    ]
    table = resynthesis.run(
        model, write(tmp_path / "s.jsonl", lines), tmp_path / "out", judge=CommandJudge(judge_command[0])
    )
    rows = {row["what"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())["rows"]}
    assert (rows["original"]["items"], rows["original"]["words"], rows["original"]["WER %"]) == (2, 7, 14.29)
    assert (rows["resynthesis"]["items"], rows["resynthesis"]["words"], rows["resynthesis"]["WER %"]) == (3, 10, 30.0)
    assert "Not a recogniser trained on the codes" in table


def test_judges(tmp_path):
    import sys

    with pytest.raises(MossError, match=r"expected \{wav\} in it"):
        CommandJudge("asr file.wav")
    (tmp_path / "deaf.py").write_text("import sys\nprint('no such model', file=sys.stderr)\nsys.exit(3)\n")
    with pytest.raises(MossError, match=r"exit code 3 for x.wav \(no such model\)"):
        CommandJudge(f"{sys.executable} {tmp_path / 'deaf.py'} {{wav}}")("x.wav")
    with pytest.raises(MossError, match="No such file"):
        CommandJudge("nobody-has-this-program {wav}")("x.wav")
    with pytest.raises(MossError, match="expected one of --judge"):
        open_judge(None, None)
    with pytest.raises(MossError, match="no such folder"):
        open_judge(tmp_path / "none", None)


def test_the_verb(folder, stories, tmp_path, capsys):
    assert main(["eval", "pairs", str(stories), "--model", str(folder), "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == (tmp_path / "out" / "table.md").read_text()
    bad = write(tmp_path / "bad.jsonl", [{"context": "a"}])
    assert main(["eval", "pairs", str(bad), "--model", str(folder), "-o", str(tmp_path / "bad")]) == 2
    assert "line 1: lacks endings, answer" in capsys.readouterr().err
    assert main(["eval", "resynthesis", str(bad), "--model", str(folder), "-o", str(tmp_path / "bad")]) == 2
    assert "expected one of --judge" in capsys.readouterr().err
    for task in ("pairs", "choice", "spoken-qa", "resynthesis"):
        with pytest.raises(SystemExit, match="0"):
            main(["eval", task, "--help"])
        assert "--model FOLDER" in capsys.readouterr().out


def test_a_recogniser_of_transformers(tmp_path):
    """A wav2vec2 with random weights, saved and opened as a real one is."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDE"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    config = transformers.Wav2Vec2Config(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
    )
    folder = tmp_path / "recogniser"
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    transformers.Wav2Vec2CTCTokenizer(tmp_path / "vocab.json").save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    judge = open_judge(folder, None)
    judged_log = judge(tmp_path / tone(tmp_path / "a.wav", 0.5))
    assert isinstance(judged_log, str) and judge.name == "transformers recogniser"
    (folder / "config.json").write_text("{}")
    with pytest.raises(MossError, match="transformers cannot open it"):
        open_judge(folder, None)
