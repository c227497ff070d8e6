"""Sampling settings, seeds and other arguments: refused before anything is loaded, the same everywhere."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moss_jax
from moss_jax.cli import main
from moss_jax.dialogue.system import System, generation_settings
from moss_jax.dialogue.turns import Turn
from moss_jax.errors import MossError
from moss_jax.generate.settings import SAMPLING

ASKED = [Turn("user", text="Hello.")]
NUMBERS = ("temperature", "top_p", "repetition_penalty")
WHOLE = ("top_k", "max_new_tokens", "min_new_tokens")
NEVER = [None, "a", "0.5", True, np.True_, [1], (), {}, 1j, np.array([1]), -1, 10**400, 1e39, np.inf, -np.inf, np.nan]


@pytest.fixture
def bare(tmp_path):
    """A system without components: a request that tries to load one fails with another error."""
    (tmp_path / "system.json").write_text(json.dumps({"format": "moss-jax-1", "sampling": {"greedy": True}}))
    return System(tmp_path)


@pytest.mark.parametrize("name", [*NUMBERS, *WHOLE])
@pytest.mark.parametrize("value", NEVER, ids=lambda value: repr(value)[:12])
def test_values_that_are_no_setting(bare, name, value):
    with pytest.raises(MossError, match=f"^{name} is .*, expected "):
        generation_settings(**{name: value})
    with pytest.raises(MossError, match=f"^{name} is .*, expected "):
        bare.reply(ASKED, reply="text", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 1e-38),
        ("temperature", 101),
        ("temperature", np.float32(1e-4)),
        ("top_p", 0),
        ("top_p", 1.0001),
        ("top_p", 1e-40),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1000),
        ("top_k", 2.7),
        ("top_k", "20"),
        ("top_k", Fraction(5, 2)),
        ("top_k", 2**31),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", 0),
        ("min_new_tokens", 0.5),
        ("min_new_tokens", 501),
        ("greedy", 1),
        ("greedy", None),
        ("greedy", "yes"),
        ("greedy", 0.0),
    ],
)
def test_out_of_range(bare, name, value):
    for make in (generation_settings, bare.settings):
        with pytest.raises(MossError, match=f"^{name} is "):
            make(**{name: value})


def test_values_that_are_converted():
    settings = generation_settings(temperature=np.float32(0.5), top_k=20.0, max_new_tokens=np.int64(9), top_p=1)
    assert settings == generation_settings(temperature=0.5, top_k=20, max_new_tokens=9, top_p=1.0)
    assert type(settings.text.top_k) is int and type(settings.text.temperature) is float
    for name, setting in SAMPLING.items():
        if name in NUMBERS:
            generation_settings(**{name: setting.lowest})
            generation_settings(**{name: setting.highest})


@given(
    st.dictionaries(
        st.sampled_from([*SAMPLING, "tempo", ""]),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text("a5.\n\ud800"), st.complex_numbers()),
    )
)
def test_any_values_are_settings_or_one_line(values):
    try:
        settings = generation_settings(**values)
    except MossError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return
    assert 1 <= settings.max_new_tokens >= settings.min_new_tokens >= 0
    assert 0.001 <= settings.text.temperature <= 100 and 0.01 <= settings.text.repetition_penalty <= 100


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"warmth": 1}, "'warmth': no such setting, expected some of temperature, top_p"),
        ({"seed": -1}, "seed is -1, expected 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296, expected 0 to 4294967295"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"seed": "6"}, "seed is '6'"),
        ({"seed": None}, "seed is None"),
        ({"voice": 5}, "voice is 5, expected a name, a file or a Voice"),
        ({"voice": b"anna"}, "voice is b'anna'"),
        ({"reply": "wrong"}, "reply: 'wrong', expected one of speech, text"),
        ({"reply": None}, "reply: None"),
        ({"reply": ["text"]}, "expected one of speech, text"),
    ],
)
def test_arguments_of_every_request(bare, keywords, message):
    keywords = {"reply": "text", **keywords}
    for ask, questions in ((bare.reply, ASKED), (bare.stream, ASKED), (bare.reply_batch, [ASKED])):
        with pytest.raises(MossError) as error:
            ask(questions, **keywords)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"first_request": -1}, "first_request is -1"),
        ({"progress": 3}, "progress is 3, expected a function"),
        ({"questions": 5}, "questions: is int"),
        ({"questions": [5]}, "turns: is int, expected a list of Turns"),
        ({"questions": ASKED}, "turns: is Turn, expected a list of Turns"),
    ],
)
def test_arguments_of_a_batch(bare, keywords, message):
    with pytest.raises(MossError, match=message):
        bare.reply_batch(**{"questions": [ASKED], "reply": "text", **keywords})


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"progress": "no"}, "progress is 'no', expected a function"),
        ({"conversation": "talk.safetensors"}, "conversation is 'talk.safetensors', expected that of a reply"),
        ({"conversation": 3}, "conversation is 3"),
        ({"turns": ASKED[0]}, "turns: is Turn, expected a list"),
        ({"turns": "Hello."}, "turns: is str, expected a list"),
    ],
)
def test_arguments_of_one_reply(bare, keywords, message):
    with pytest.raises(MossError, match=message):
        bare.reply(**{"turns": ASKED, "reply": "text", **keywords})


def test_a_given_sampling_setting_switches_the_greedy_of_a_system_off(bare):
    assert bare.sampling["greedy"] and bare.settings().text.greedy
    for sampling in ({"temperature": 0.9}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.6}):
        assert not bare.settings(**sampling).text.greedy
        assert not bare.settings(**sampling).audio.greedy
        assert bare.settings(**sampling, greedy=True).text.greedy
    assert bare.settings(repetition_penalty=1.3, max_new_tokens=9, min_new_tokens=3).text.greedy
    assert not bare.settings(greedy=False).text.greedy


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "inf"],
        ["--temperature", "1e39"],
        ["--temperature", "1e-38"],
        ["--temperature", "nan"],
        ["--repetition-penalty", "1e-40"],
        ["--repetition-penalty", "inf"],
        ["--top-k", str(2**40)],
        ["--top-k", "2.7"],
        ["--max-new-tokens", "1.5"],
        ["--seed", str(2**32)],
        ["--seed", "-1"],
        ["--batch-size", "0"],
    ],
)
def test_the_command_line_refuses_them_before_it_looks_for_the_model(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["chat", "--text", "Hi", "--model", "nowhere", "--reply", "text", *flags])
    except SystemExit as exit:  # argparse: not a number at all
        code = exit.code
    err = capsys.readouterr().err
    assert code == 2 and "nowhere" not in err and len(err.splitlines()) == 1
    name = flags[0].removeprefix("--")
    assert name in err or name.replace("-", "_") in err


@pytest.mark.parametrize("verb", [["init-random", "x"], ["corpus", "x"], ["convert", "-o", "x"]])
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_every_verb_has_the_same_seeds(tmp_path, monkeypatch, capsys, verb, seed):
    monkeypatch.chdir(tmp_path)
    assert main([*verb, "--seed", str(seed)]) == 2
    assert f"seed is {seed}, expected 0 to 4294967295" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_promise_defaults_that_a_system_may_change(capsys):
    with pytest.raises(SystemExit):
        main(["chat", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "0.001 to 100 (default: 0.6 unless the system has its own)" in out


@pytest.mark.parametrize("own", [{"temperature": 1e39}, {"top_k": 2.5}, {"greedy": 1}, {"min_new_tokens": 900}])
def test_the_ranges_hold_for_system_json_too(tmp_path, own):
    (tmp_path / "system.json").write_text(json.dumps({"format": "moss-jax-1", "sampling": own}))
    with pytest.raises(MossError, match=f"system.json: sampling: {next(iter(own))} is "):
        System(tmp_path).settings()


@pytest.mark.parametrize("voice", [1.5, ["anna"], {"name": "anna"}, True])
def test_a_default_voice_that_is_not_a_name(tmp_path, voice):
    import shutil

    from moss_jax.checkpoint.system_folder import NANO_FOLDER

    shutil.copytree(NANO_FOLDER, tmp_path / "nano")
    (tmp_path / "nano" / "system.json").write_text(json.dumps({"format": "moss-jax-1", "default_voice": voice}))
    with pytest.raises(MossError, match="default_voice"):
        System(tmp_path / "nano").voice()


def test_voices_with_impossible_names():
    system = System(moss_jax.checkpoint.system_folder.NANO_FOLDER)
    for name in ("x" * 300, "a\0b", "", "caf\udce9"):
        with pytest.raises(MossError, match="neither a file nor a voice of the system"):
            system.voice(name)


@pytest.mark.slow
def test_flags_change_the_replies_of_a_greedy_system(capsys):
    def ask(*flags):
        assert main(["chat", "--text", "What is the capital of Peru?", "--reply", "text", *flags]) == 0
        out, err = capsys.readouterr()
        return out, err

    greedy, err = ask()
    assert err == ""
    same, err = ask("--seed", "6")
    assert same == greedy and "note: the seed has no effect: the reply is greedy" in err
    drawn = [ask("--temperature", "30", "--max-new-tokens", "12", "--seed", seed)[0] for seed in ("6", "7")]
    assert len({greedy, *drawn}) == 3
    same, err = ask("--greedy", "--temperature", "30")
    assert same == greedy and "note: temperature has no effect: the reply is greedy" in err
