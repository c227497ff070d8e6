"""Files of questions: JSON lines, one conversation each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_jax.dialogue.turns import Turn, check_turns
from moss_jax.documents import code_list, located, parse_object, plain_name, read_lines, short, shown
from moss_jax.errors import MossError
from moss_jax.files import is_file


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
    questions: dict[str, Question] = {}
    for line in read_lines(path):
        with located(f"{path} line {line.number}"):
            question = _question(parse_object(line.content), line.number, path.parent, system)
            if question.name in questions:
                raise MossError(f"the id {shown(question.name)} is there twice")
            questions[question.name] = question
    if not questions:
        raise MossError(f"{path}: holds no question, expected a JSON object a line")
    return list(questions.values())


def _question(entry: dict[str, Any], number: int, folder: Path, system: str | None) -> Question:
    name = plain_name(entry.pop("id", f"{number:05d}"))
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
        raise MossError(f"a turn is {shown(entry)}, expected an object")
    if unknown := set(entry) - {"role", "text", "audio", "codes"}:
        raise MossError(f"unknown: {', '.join(map(short, sorted(unknown)))}; expected role, text, audio, codes")
    audio = entry.get("audio")
    if audio is not None and not isinstance(audio, str):
        raise MossError(f"audio is {shown(audio)}, expected a file name")
    if audio is not None and not is_file(folder / audio):
        raise MossError(f"audio {short(audio)}: no such file")
    place = None if audio is None else folder / audio
    codes = entry.get("codes")
    if codes is not None:
        codes = code_list(codes)
    return Turn(entry.get("role", "user"), text=entry.get("text"), audio=place, codes=codes)
