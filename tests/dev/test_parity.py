"""The comparison with golden files, independent of the component: every difference is reported."""

import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from dev import parity
from moss_jax.cli import main
from moss_jax.errors import MossError


@pytest.fixture
def echo(monkeypatch):
    """A component that returns its inputs, `masked` compared in its first row only."""

    def run(golden):
        out = {"y": golden.need("x"), "n": golden.need("i"), "y@again": golden.need("x")}
        return out | {"masked": (golden.need("x"), np.arange(len(golden.need("x")))[:, None] == 0)}

    module = types.ModuleType("echo")
    module.COMPONENTS = {"test.echo": run}
    monkeypatch.setitem(parity.MODULES, "test.echo", "echo")
    monkeypatch.setitem(sys.modules, "dev.parity.echo", module)


X = np.array([[1.0, -np.inf], [3.0, 100.0]], np.float32)
I = np.array([1, 2, 3], np.int32)


def write(path, *, final=None, component="test.echo", **tensors):
    final = {"y": [1e-4, 1e-3], "n": [0, 0]} if final is None else final
    tensors = {"input/x": X, "input/i": I, "output/y": X, "output/n": I} | {
        k.replace("__", "/"): v for k, v in tensors.items()
    }
    tensors = {name: value for name, value in tensors.items() if value is not None}
    meta = {"format": "golden-1", "component": component, "config": "{}", "contract": "{}", "final": json.dumps(final)}
    save_file(tensors, path, metadata=meta)
    return str(path)


def test_equal_outputs_pass(echo, tmp_path, capsys):
    assert main(["parity", write(tmp_path / "a.safetensors")]) == 0
    assert "2 outputs compared, 0 missed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"output__y": X * np.array([[1.0, 1.0], [1.0, 1.002]], np.float32)},
        {"output__y": np.where(np.isinf(X), np.inf, X).astype(np.float32)},
        {"output__y": np.where(X == 3, np.nan, X).astype(np.float32)},
        {"output__y": np.where(np.isinf(X), -1e38, X).astype(np.float32)},
        {"output__n": I + np.array([0, 0, 1], np.int32)},
        {"output__y": X[:, :1]},
        {"output__y": None},
        {"input__x": None},
        {"final": {}},
        {"final": {"other": [0, 0]}},
        {"final": {"masked": [0, 0]}, "output__masked": np.zeros((0, 2), np.float32)},
        {"component": "test.unknown"},
    ],
)
def test_every_difference_fails(echo, tmp_path, change, capsys):
    assert main(["parity", write(tmp_path / "a.safetensors", **change)]) == 1
    assert "MISS" in capsys.readouterr().out


def test_masked_rows_are_not_compared(echo, tmp_path):
    other = X.copy()
    other[1] = 7
    path = write(tmp_path / "a.safetensors", final={"masked": [0, 0]}, output__masked=other)
    assert main(["parity", path]) == 0
    other[0, 0] = 7
    assert main(["parity", write(tmp_path / "b.safetensors", final={"masked": [0, 0]}, output__masked=other)]) == 1


def test_a_suffix_after_at_checks_the_same_output_again(echo, tmp_path):
    assert main(["parity", write(tmp_path / "a.safetensors", final={"y@again": [0, 0]})]) == 0


def test_an_unreadable_file_exits_with_2_and_the_others_still_run(echo, tmp_path, capsys):
    good = write(tmp_path / "good.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "good.safetensors").read_bytes()[:-8])
    assert main(["parity", str(cut), str(tmp_path / "none.safetensors"), good]) == 2
    captured = capsys.readouterr()
    assert "cut.safetensors: not a readable safetensors file" in captured.err
    assert "none.safetensors: no such file" in captured.err
    assert "2 outputs compared, 0 missed" in captured.out


@pytest.mark.parametrize("problem", ["missing", "contradicting"])
def test_a_bad_config_fails(echo, monkeypatch, tmp_path, capsys, problem):
    def run(golden):
        if problem == "missing":
            return golden.config["size"]
        raise MossError("size is 3, expected an even number")

    monkeypatch.setitem(sys.modules["dev.parity.echo"].COMPONENTS, "test.echo", run)
    assert main(["parity", write(tmp_path / "a.safetensors")]) == 1
    expected = {"missing": "MISS config has no 'size'", "contradicting": "MISS size is 3, expected an even number"}
    assert expected[problem] in capsys.readouterr().out


def test_an_exception_fails_only_its_own_file(echo, monkeypatch, tmp_path, capsys):
    def run(golden):
        raise ValueError("shapes (2,) and (3,) do not fit")

    monkeypatch.setitem(sys.modules["dev.parity.echo"].COMPONENTS, "test.echo", run)
    files = [write(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    assert main(["parity", *files]) == 1
    out = capsys.readouterr().out
    assert out.count("test.echo failed: ValueError: shapes (2,) and") == 2 and "2 outputs compared, 2 missed" in out


GOLDENS = [
    f"codec/{name}"
    for name in (
        "campplus",
        "cfm_estimator",
        "cfm_rand_noise",
        "encode_segments",
        "flow_inference",
        "hift",
        "kaldi_fbank",
        "prompt_mel_24k",
        "resample",
        "token2wav_offline",
        "token2wav_streaming",
        "upsample_encoder",
        "vq_encoder",
        "whisper_logmel",
    )
] + [
    f"lm/{name}"
    for name in (
        "fsm_table",
        "generate",
        "generate_quirks",
        "grids",
        "qwen3_forward",
        "sampler",
        "split_forward",
    )
]


@pytest.mark.parametrize("name", GOLDENS)
def test_extra_and_missing_weights_fail(golden, name):
    file = parity.read_golden(golden(name))
    damaged = [file.weights | {"extra.weight": np.zeros(3, np.float32)}]
    if file.weights:
        damaged.append(dict(sorted(file.weights.items())[1:]))
    for weights in damaged:
        (check,) = parity.check_golden(replace(file, weights=weights))
        assert not check.passed and "failed" not in check.note
