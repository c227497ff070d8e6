import json
from dataclasses import dataclass, field

import pytest

from moss_jax.checkpoint.config_io import ADDED_LATER, read_config, write_config
from moss_jax.documents import read_json
from moss_jax.errors import MossError


@dataclass(frozen=True)
class Inner:
    rates: tuple[int, ...] = (8, 5, 3)
    dilations: tuple[tuple[int, ...], ...] = ((1, 3), (1, 3, 5))


@dataclass(frozen=True)
class Outer:
    width: int = 4
    eps: float = 1e-5
    name: str = "a"
    flag: bool = True
    window: int | None = None
    later: float = field(default=2.0, metadata=ADDED_LATER)
    inner: Inner = field(default_factory=Inner)

    def check(self):
        if self.width % 2:
            raise ValueError(f"width {self.width} is odd, expected an even number")


def test_round_trip_through_json():
    config = Outer(width=6, eps=1.0, window=3, inner=Inner(rates=(2,)))
    data = json.loads(json.dumps(write_config(config)))
    assert read_config(Outer, data, "x") == config
    assert read_config(Outer, data | {"eps": 1}, "x") == config
    assert read_config(Outer, {key: value for key, value in data.items() if key != "later"}, "x") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 3}, "unknown: widht"),
        ({"width": "4"}, "width is str '4', expected int"),
        ({"width": True}, "width is bool True, expected int"),
        ({"width": 4.0}, "width is float 4.0"),
        ({"name": None}, "name is null, expected str"),
        ({"window": "x"}, "window is str"),
        ({"inner": 3}, "inner is int 3, expected an object"),
        ({"inner": {"rates": [1, "2"], "dilations": []}}, r"inner.rates\[1\] is str"),
        ({"inner": {"rates": 1, "dilations": []}}, "inner.rates is int 1, expected a list"),
        ({"inner": {"rates": []}}, "missing: inner.dilations"),
        ({"width": 3}, "^folder/config.json: width 3 is odd"),
    ],
)
def test_a_bad_config_says_what_is_wrong(change, message):
    with pytest.raises(MossError, match=message):
        read_config(Outer, write_config(Outer()) | change, "folder/config.json")


def test_all_problems_come_at_once():
    data = write_config(Outer()) | {"width": "4", "more": 1}
    del data["eps"]
    with pytest.raises(MossError) as caught:
        read_config(Outer, data, "c.json")
    assert all(word in str(caught.value) for word in ("c.json", "unknown: more", "missing: eps", "wrong type: width"))


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "JSON list"), (None, "no such file")])
def test_read_json_errors(tmp_path, text, message):
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises(MossError, match=message):
        read_json(tmp_path / "c.json")
