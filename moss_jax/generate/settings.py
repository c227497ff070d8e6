"""The sampling settings of a reply: names, defaults, ranges, and the one check of them.

The command line, the Python API, the demo and a system's own system.json all use it. Nothing here needs jax.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moss_jax.arguments import MAX_INT, check_number, check_whole
from moss_jax.errors import MossError, shown


@dataclass(frozen=True)
class Setting:
    """One setting: its default and the values that are allowed, both ends included."""

    default: float | int | bool
    lowest: float | int = 0
    highest: float | int = 1
    whole: bool = False
    hint: str = ""  # what the error adds

    def check(self, name: str, value: Any) -> float | int | bool:
        """`value` as a plain Python number; MossError when it is of another kind or out of range."""
        if isinstance(self.default, bool):
            if type(value).__name__ not in ("bool", "bool_"):  # numpy calls its own one or the other
                raise MossError(f"{name} is {shown(value)}, expected True or False")
            return bool(value)
        check = check_whole if self.whole else check_number
        try:
            return check(name, value, self.lowest, self.highest)
        except MossError as error:
            raise MossError(f"{error}{self.hint}") from error


# The defaults are those of the released driver. The ranges keep float32 arithmetic exact enough: beyond them logits
# overflow or become equal, and what is drawn no longer depends on the model.
SAMPLING: dict[str, Setting] = {
    "temperature": Setting(0.6, 0.001, 100.0, hint=" (greedy takes the most likely)"),
    "top_p": Setting(0.95, 1e-6, 1.0, hint=" (1 is off)"),
    "top_k": Setting(20, 0, MAX_INT, whole=True, hint=" (0 is off)"),
    "repetition_penalty": Setting(1.1, 0.01, 100.0, hint=" (1 is off)"),
    "greedy": Setting(False),
    "max_new_tokens": Setting(500, 1, MAX_INT, whole=True),
    "min_new_tokens": Setting(0, 0, MAX_INT, whole=True),
}
DEFAULTS = {name: setting.default for name, setting in SAMPLING.items()}
RANDOM_SETTINGS = ("temperature", "top_p", "top_k")  # the settings that have no effect on a greedy reply


def check_sampling(given: Mapping[str, Any]) -> dict[str, float | int | bool]:
    """The same settings as plain Python numbers, some or all of SAMPLING.

    Raises:
        MossError: an unknown name, a value of another kind or out of range.
    """
    unknown = [name for name in given if name not in SAMPLING]
    if unknown:
        raise MossError(f"{shown(unknown[0])}: no such setting, expected some of {', '.join(SAMPLING)}")
    return {name: SAMPLING[name].check(name, value) for name, value in given.items()}


def chosen(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a request.

    Args:
        own: of the system; what is missing is as in DEFAULTS.
        given: of the request, in place of `own`. Where it has a temperature, top_p or top_k and does not say `greedy`,
            the reply is drawn, whatever the system's own `greedy` says.

    Raises:
        MossError: as `check_sampling`, or min_new_tokens is above max_new_tokens.
    """
    given = check_sampling(given)
    settings = DEFAULTS | check_sampling(own) | given
    if "greedy" not in given and any(name in given for name in RANDOM_SETTINGS):
        settings["greedy"] = False
    most = settings["max_new_tokens"]
    if settings["min_new_tokens"] > most:
        raise MossError(f"min_new_tokens is {settings['min_new_tokens']}, expected 0 to {most} (max_new_tokens)")
    return settings
