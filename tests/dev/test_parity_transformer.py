"""The parity components of the language model, and that they report damaged files."""

from dataclasses import replace

import numpy as np
import pytest

from dev.parity import check_golden, read_golden

NOT_COMPUTED = {"hidden_after_shared", "text_hidden", "audio_hidden"}
FILES = ["lm/qwen3_forward", "lm/split_forward"]


@pytest.mark.parametrize("name", FILES)
def test_outputs_and_intermediate_values_match(golden, name):
    file = read_golden(golden(name))
    known = [key for key in file.outputs if key not in NOT_COMPUTED]
    checks = list(check_golden(replace(file, final={key: (1e-3, 1e-4) for key in known})))
    assert len(checks) == len(known) and all(check.passed for check in checks), checks


@pytest.mark.parametrize("name", FILES)
def test_missing_changed_and_extra_tensors_fail(golden, name):
    file = read_golden(golden(name))
    weight = next(key for key in file.weights if key.endswith("0.self_attn.k_norm.weight"))
    fewer = {key: value for key, value in file.weights.items() if key != weight}
    damaged = {
        "missing": fewer,
        "unmapped": file.weights | {"model.layers.9.extra": np.zeros(3, np.float32)},
        "misshapen": file.weights | {weight: np.zeros(3, np.float32)},
    }
    for note, weights in damaged.items():
        checks = list(check_golden(replace(file, weights=weights)))
        assert note in checks[0].note and not checks[0].passed
    changed = file.weights | {weight: file.weights[weight] * 1.2}
    assert not all(check.passed for check in check_golden(replace(file, weights=changed)))


def test_without_a_mask_all_rows_are_valid(golden):
    file = read_golden(golden("lm/split_forward"))
    row = int(np.argmax(file.inputs["attention_mask"].all(1)))
    outputs = {key: value[row : row + 1] for key, value in file.outputs.items()}
    inputs = {"grid": file.inputs["grid"][row : row + 1]}
    assert all(check.passed for check in check_golden(replace(file, inputs=inputs, outputs=outputs)))


def test_new_tensors_of_the_conversion_are_required(golden):
    file = read_golden(golden("lm/qwen3_forward"))
    checks = list(check_golden(replace(file, new={})))
    assert "missing: audio_lm_head.weight" in checks[0].note
    inputs = {key: value for key, value in file.inputs.items() if not key.startswith("split")}
    checks = list(check_golden(replace(file, new={}, inputs=inputs, final={"logits": file.final["logits"]})))
    assert [check.passed for check in checks] == [True]
