"""The parity component of the training step, and that it reports damaged files."""

from dataclasses import replace

import numpy as np
import pytest

from dev import parity
from dev.parity import check_golden, read_golden
from dev.parity.train import by_contract, measured

FILE = "lm/train_step"


@pytest.fixture(scope="module")
def ran(golden):
    file = read_golden(golden(FILE))
    return file, *measured(file)


def missed(file, results, grads):
    results = by_contract(file, results, grads)
    checks = (parity.compare(name, file, results, tolerance) for name, tolerance in file.final.items())
    return {check.output for check in checks if not check.passed}


@pytest.mark.slow
def test_every_output_matches_and_every_change_fails(ran):
    file, results, grads = ran
    assert sorted(file.outputs) == sorted(file.final) and missed(file, results, grads) == set()
    for name, value in file.outputs.items():
        changed = value.copy()
        at = np.unravel_index(np.abs(changed).argmax(), changed.shape)
        whole = changed.dtype.kind == "i" or changed[at] == 0  # a zero gradient must be exactly zero
        changed[at] = changed[at] + 1 if whole else changed[at] * 1.05
        assert missed(replace(file, outputs=file.outputs | {name: changed}), results, grads) == {name}


def test_damaged_files_fail(ran):
    file = ran[0]
    weight = "model.shared_block.layers.0.self_attn.k_norm.weight"
    fewer = {key: value for key, value in file.weights.items() if key != weight}
    labels = file.inputs["labels"].copy()
    labels[np.unravel_index((labels >= 0).argmax(), labels.shape)] += 1
    damaged = {
        "missing: model.shared_block": replace(file, weights=fewer),
        "unmapped": replace(file, weights=file.weights | {"model.extra": np.zeros(3, np.float32)}),
        "input/labels is missing": replace(file, inputs={"grid": file.inputs["grid"]}),
        "input/labels differ": replace(file, inputs=file.inputs | {"labels": labels}),
        "'optimizer' is not": replace(file, meta=file.meta | {"optimizer": "{}"}),
    }
    for note, copy in damaged.items():
        checks = list(check_golden(copy))
        assert not checks[0].passed and note in checks[0].note


@pytest.mark.slow
def test_a_changed_weight_fails(ran):
    file = ran[0]
    weight = "model.shared_block.layers.0.self_attn.k_norm.weight"
    changed = replace(file, weights=file.weights | {weight: file.weights[weight] * 1.05})
    assert not all(check.passed for check in check_golden(changed))
