"""docs/scale.md: the numbers of every row equal those of the compiler output that it links to."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "scale.md").read_text()
ROWS = [
    ([cell.strip() for cell in line.strip("| ").split("|")[:-1]], match[1])
    for line in PAGE.splitlines()
    if (match := re.search(r"\((scale/[^)]+\.json)\) \|$", line))
]


def rows(first: str) -> list[tuple[list[str], dict]]:
    """(cells, compiler output) of the rows whose first cell matches."""
    return [(cells, json.loads((DOCS / path).read_text())) for cells, path in ROWS if re.match(first, cells[0])]


def test_every_output_has_a_row_and_every_row_an_output():
    assert {path for _, path in ROWS} == {f"scale/{path.name}" for path in (DOCS / "scale").iterdir()}


def test_memory_rows():
    found = rows("`")
    assert len(found) == len(list((DOCS / "scale").iterdir()))
    for cells, output in found:
        function, *options = cells[0].strip("`").split()
        assert function == output["function"]
        for name, value in zip(options[::2], options[1::2], strict=True):
            assert value == str(output[name.removeprefix("--")])
        mesh = ", ".join(f"{axis} {size}" for axis, size in output["mesh"].items()) or "-"
        gib = [f"{output[f'{name}_gib']:.3f}" for name in ("argument", "temporary", "total")]
        seconds = f"{output['compile_seconds']:.0f}"
        rest = [str(output["chips"]), mesh, *gib, str(output["chip_gib"]), seconds, output["versions"]["libtpu"]]
        assert cells[1:] == rest


def test_training_time_rows():
    found = [(cells, output) for cells, output in rows(r"\w+, \d") if "step_flop" in output]
    assert len(found) == sum("step_flop" in output for _, output in rows("`"))
    for cells, output in found:
        assert cells[:2] == [
            f"{output['function']}, {output['batch']} x {output['context']}",
            f"{output['chips']} {output['topology'].partition(':')[0]}",
        ]
        assert [float(cell.replace(",", "")) for cell in cells[2:]] == pytest.approx(
            [output[name] for name in ("tokens", "step_flop", "step_seconds_at_mfu", "tokens_per_second_at_mfu")]
        )


def test_collective_rows():
    found = rows(r"[\w-]+, v\d")
    assert len(found) == len(rows("`"))
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
    for cells, output in found:
        assert cells[0] == f"{output['function']}, {output['topology']}"
        expected = [
            f"{item['count']:,}: {item['bytes'] / 1e9:.3g}" if (item := output["collectives"].get(kind)) else "-"
            for kind in kinds
        ]
        assert cells[1:] == expected
