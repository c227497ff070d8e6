"""The judge recognises speech and nothing else; the report runs on any system and is resumed after an interruption."""

import json
import re

import numpy as np
import pytest

from moss_jax.cli import main
from moss_jax.convert.random_system import init_random
from moss_jax.data.espeak import speak
from moss_jax.evaluate.model import EvaluatedModel
from moss_jax.recipes.nano import domain, report
from moss_jax.recipes.nano import judge as judges
from moss_jax.recipes.nano.items import read_items
from moss_jax.recipes.nano.judge import Recognition, expected_seconds, grammar, measure
from moss_jax.text.words import normalized_words, word_errors


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("pocketsphinx")
    return judges.NanoJudge()


def answer_pattern():
    """The grammar as a regular expression."""
    rules = dict(re.findall(r"^(?:public )?<(\w+)> = (.*);$", grammar(), re.MULTILINE))
    pattern = "<answer>"
    while found := re.search(r"<(\w+)>", pattern):
        pattern = pattern.replace(found[0], f"({rules[found[1]]})")
    return re.compile(re.sub(r" *([()|]) *", r"\1", pattern).replace(" ", "") + "$")


def test_the_grammar_is_frozen_and_holds_every_answer_right_or_wrong():
    assert judges.GRAMMAR.read_text() == grammar()
    pattern = answer_pattern()
    for answer in domain.answers():
        assert pattern.match("".join(normalized_words(answer)))
    assert pattern.match("sevenplusfiveissix") and pattern.match("yestwoisgreaterthantwo")
    assert not pattern.match("sevenplusfive") and not pattern.match("sevenplusfiveistwelvetwo")
    assert len({" ".join(normalized_words(answer)) for answer in domain.answers()}) == len(domain.answers())


def test_what_counts_as_the_right_answer():
    assert Recognition("yes seven is greater than five").says("Yes, seven is greater than five.")
    assert not Recognition("seven plus five is", "").says("Seven plus five is twelve.")
    assert not Recognition("seven plus five is twelve", "steady (1.0 dB)").says("Seven plus five is twelve.")
    assert expected_seconds("hello how can i help you") > expected_seconds("grass is green") > 0.5


def test_the_judge_recognises_the_answering_voice(judge):
    items = read_items("sentences")[::40] + read_items("voices")[::60]
    results = [judge.recognize(*speak(item.answers[0], *domain.ANSWER_SPEAKER)[:2]) for item in items]
    assert not any(each.refused for each in results)
    assert sum(each.says(item.answers[0]) for each, item in zip(results, items, strict=True)) >= len(items) - 1
    wave, rate, _ = speak(items[0].answers[0], *domain.ANSWER_SPEAKER)
    assert (
        judge.recognize(wave, rate) == judge.recognize(0.3 * wave, rate) == results[0]
    )  # independent of earlier calls


def test_the_judge_refuses_sound_without_speech(judge):
    draw = np.random.default_rng(0)
    wave, rate, _ = speak("Seven plus five is twelve.", *domain.ANSWER_SPEAKER)
    noise = draw.standard_normal(2 * 16000).astype(np.float32)
    tone = np.sin(np.arange(2 * 16000) / 20).astype(np.float32)
    for sound in (0.1 * noise, 1e-4 * noise, 0.3 * tone, np.zeros(16000, np.float32), noise[:100]):
        assert judge.recognize(sound, 16000).refused
    # Right words at a pace that nobody speaks at.
    assert "long" in judge.recognize(*speak("Seven plus five is twelve.", "en-us+klatt3", 80, 50)[:2]).refused
    assert judge.recognize(np.concatenate([wave] * 3), rate).refused
    assert judge.recognize(np.pad(wave, 5 * rate), rate) == Recognition("seven plus five is twelve")
    level, spread, begin, end = measure(np.pad(wave, 5 * rate), rate)
    assert (level, spread, begin - 5, end - 5) == pytest.approx(measure(wave, rate), abs=0.03)


def test_the_judge_needs_pocketsphinx(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(judges.MossError, match=r"moss-jax\[judge\]"):
        judges.NanoJudge()


def test_word_errors_are_jiwers():
    jiwer = pytest.importorskip("jiwer")
    draw = np.random.default_rng(0)
    for _ in range(50):
        reference, found = (" ".join(draw.choice(["a", "b", "c"], draw.integers(1, 9))) for _ in range(2))
        counts = jiwer.process_words(reference, found)
        assert (
            word_errors(reference.split(), found.split()) == counts.substitutions + counts.deletions + counts.insertions
        )


def test_controls_never_keep_their_own_answer():
    items = {item.name: item for item in read_items("voices")}
    for others in (report.next_of_kind(items), report.shuffled_items(items)):
        assert others.keys() == items.keys() and all(name != other for name, other in others.items())
    others = report.next_of_kind(items)
    assert all(items[name].answers != items[other].answers for name, other in others.items())
    same = [items[name].kind == items[other].kind for name, other in others.items()]
    assert np.mean(same) == pytest.approx(1 - 40 / len(items))  # social turns: one answer a kind


def test_pesq_and_stoi_of_a_sound_itself():
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    wave = np.random.default_rng(0).standard_normal(32000).astype(np.float32) * 0.1
    wave[8000:12000] = 0
    same, worse = (report.quality(wave, wave + noise * np.roll(wave, 777), 16000) for noise in (0, 0.7))
    assert same["pesq"] > 4.5 and same["stoi"] > 0.999
    assert worse["pesq"] < same["pesq"] - 1 and worse["stoi"] < 0.95


@pytest.mark.long
@pytest.mark.slow
def test_the_report_on_a_random_system(tmp_path, capsys, monkeypatch, judge):
    pytest.importorskip("pesq")
    init_random(tmp_path / "tiny", "tiny", say=lambda line: None)
    words = [
        "eval",
        "nano",
        "--model",
        str(tmp_path / "tiny"),
        "-o",
        str(tmp_path / "out"),
        "--items",
        "2",
        "--batch-size",
        "2",
        "--sets",
        "voices",
        "two-turn",
        "sentences",
        "--ways",
        "ss",
        "st",
    ]
    monkeypatch.setattr(report, "SAMPLING", report.SAMPLING | {"max_new_tokens": 20})
    assert main(words) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {row["what"]: row for row in table["rows"]}
    assert rows["judge's ceiling, unseen voices"]["right"] == 2
    for what in (
        "S->S, unseen voices",
        "S->S, two turns, unseen voices",
        "codec: codes -> speech, unseen answers, for the codec",
        "control: S->S, weights in random order",
        "control: the answering voice, answers shuffled",
        "S->T, unseen voices, 15 dB quieter",
    ):
        assert (rows[what]["items"], rows[what]["right"]) == (2, 0)
    assert "PESQ-wb" in "".join(table["notes"])
    assert "Streamed beside one piece, question by question: 0 of " in "".join(table["notes"])
    before = (tmp_path / "out" / "results.jsonl").read_text()
    assert main(words) == 0 and (tmp_path / "out" / "results.jsonl").read_text() == before
    model = EvaluatedModel(tmp_path / "tiny", batch_size=2)
    table_text = report.run(model, tmp_path / "few", sets=("voices",), ways=("ss", "tt"), limit=2, replies_only=True)
    lines = (tmp_path / "few" / "results.jsonl").read_text().splitlines()[1:]
    assert {json.loads(line)["part"] for line in lines} == {"ss", "tt"} and "S->S, unseen voices" in table_text
    capsys.readouterr()
    assert main([*words[:6], "--sets", "nobody"]) == 2
    assert "sets: nobody, expected some of voices" in capsys.readouterr().err
