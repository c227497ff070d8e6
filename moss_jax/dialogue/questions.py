"""Files of questions: JSON lines, one conversation each."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jax.dialogue.turns import Turn, check_turns
from moss_jax.errors import MossError


@dataclass(frozen=True)
class Question:
    name: str  # a plain file name without an ending, unlike every other one in the file
    turns: list[Turn]


def read_questions(path: str | Path, system: str | None = None) -> list[Question]:
    """The questions in a file of JSON lines.

    A line is {"text": ...}, {"audio": FILE} or {"turns": [{"role": ..., "text" or "audio" or "codes": ...}, ...]}, each
    with an optional "id". Files are looked for beside the JSON lines. Empty lines are skipped.

    Args:
        system: a system turn for the questions that have none.

    Raises:
        MossError: the first line that is wrong, or no line at all.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise MossError(f"{path}: no such file, expected JSON lines") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MossError(f"{path}: cannot be read ({error})") from error
    questions: dict[str, Question] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = _question(json.loads(line), number, path.parent, system)
        except json.JSONDecodeError as error:
            raise MossError(f"{path} line {number}: not JSON ({error}), expected an object") from error
        except MossError as error:
            raise MossError(f"{path} line {number}: {error}") from error
        if question.name in questions:
            raise MossError(f"{path} line {number}: the id {question.name!r} is there twice")
        questions[question.name] = question
    if not questions:
        raise MossError(f"{path}: holds no question, expected a JSON object a line")
    return list(questions.values())


def _question(entry: Any, number: int, folder: Path, system: str | None) -> Question:
    if not isinstance(entry, dict):
        raise MossError(f"is a JSON {type(entry).__name__}, expected an object")
    entry = dict(entry)
    name = str(entry.pop("id", f"{number:05d}"))
    if Path(name).name != name or name.startswith("."):
        raise MossError(f"id {name!r} is no plain file name")
    if "turns" in entry:
        turns = entry.pop("turns")
        if entry or not isinstance(turns, list):
            raise MossError("with 'turns' there is only 'id' beside it, and 'turns' is a list")
    else:
        turns = [{"role": "user"} | entry]
    turns = [_turn(turn, folder) for turn in turns]
    if system and turns and turns[0].role != "system":
        turns.insert(0, Turn("system", text=system))
    check_turns(turns)
    return Question(name, turns)


def _turn(entry: Any, folder: Path) -> Turn:
    if not isinstance(entry, Mapping):
        raise MossError(f"a turn is a JSON {type(entry).__name__}, expected an object")
    if unknown := set(entry) - {"role", "text", "audio", "codes"}:
        raise MossError(f"unknown: {', '.join(sorted(unknown))}; expected role, text, audio, codes")
    audio = entry.get("audio")
    if audio is not None and not isinstance(audio, str):
        raise MossError(f"audio is {type(audio).__name__}, expected a file name")
    if audio is not None and not (folder / audio).is_file():
        raise MossError(f"audio {audio}: no such file")
    place = None if audio is None else folder / audio
    return Turn(entry.get("role", "user"), text=entry.get("text"), audio=place, codes=entry.get("codes"))
