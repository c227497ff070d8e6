"""The sampling settings of a reply: names, defaults, ranges, and their only check.

The command line, the Python API, the demo and a system's own system.json all use it. Nothing here needs jax.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moss_jax.arguments import MAX_INT, check_number, check_whole
from moss_jax.errors import MossError, shown


@dataclass(frozen=True)
class Setting:
    """One setting: its default, and the lowest and highest value that is allowed."""

    default: float | int | bool
    lowest: float | int = 0
    highest: float | int = 1
    whole: bool = False  # a whole number
    hint: str = ""  # the end of the error message

    def check(self, name: str, value: Any) -> float | int | bool:
        """`value` as a plain Python number.

        Raises:
            MossError: it has another type or is out of range.
        """
        if isinstance(self.default, bool):
            if type(value).__name__ not in ("bool", "bool_"):  # numpy has used both names for its own type
                raise MossError(f"{name} is {shown(value)}, expected True or False")
            return bool(value)
        try:
            if self.whole:
                return check_whole(name, value, int(self.lowest), int(self.highest))
            return check_number(name, value, self.lowest, self.highest)
        except MossError as error:
            raise MossError(f"{error}{self.hint}") from error


# The defaults are those of the released driver. Beyond the ranges float32 logits overflow or become equal, and the
# sampled ids no longer depend on the model.
SAMPLING: dict[str, Setting] = {
    "temperature": Setting(0.6, 0.001, 100.0, hint=" (greedy takes the most likely)"),
    "top_p": Setting(0.95, 1e-6, 1.0, hint=" (1 is off)"),
    "top_k": Setting(20, 0, MAX_INT, whole=True, hint=" (0 is off)"),
    "repetition_penalty": Setting(1.1, 0.01, 100.0, hint=" (1 is off)"),
    "greedy": Setting(False),
    "max_new_tokens": Setting(500, 1, MAX_INT, whole=True),
    "min_new_tokens": Setting(0, 0, MAX_INT, whole=True),
}
DEFAULTS: dict[str, Any] = {name: setting.default for name, setting in SAMPLING.items()}
RANDOM_SETTINGS = ("temperature", "top_p", "top_k")  # they have no effect on a greedy reply


def check_sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, some or all of SAMPLING, as plain Python numbers.

    Raises:
        MossError: an unknown name, or a value of another type or out of range.
    """
    unknown = [name for name in given if name not in SAMPLING]
    if unknown:
        raise MossError(f"{shown(unknown[0])}: no such setting, expected some of {', '.join(SAMPLING)}")
    return {name: SAMPLING[name].check(name, value) for name, value in given.items()}


def resolve_settings(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a request.

    Args:
        defaults: those of the system; settings that it does not name have the values in DEFAULTS.
        given: those of the request, which override `defaults`. If they include a temperature, top_p or top_k but not
            `greedy`, the reply is sampled even where the system's default is greedy.

    Raises:
        MossError: as `check_sampling`, or min_new_tokens is above max_new_tokens.
    """
    given = check_sampling(given)
    settings = DEFAULTS | check_sampling(defaults) | given
    if "greedy" not in given and any(name in given for name in RANDOM_SETTINGS):
        settings["greedy"] = False
    maximum = settings["max_new_tokens"]
    if settings["min_new_tokens"] > maximum:
        raise MossError(f"min_new_tokens is {settings['min_new_tokens']}, expected 0 to {maximum} (max_new_tokens)")
    return settings
