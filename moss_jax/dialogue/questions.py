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
    """One conversation to answer.

    Attributes:
        name: a file name without a suffix, unique in its file.
        turns: the conversation, the question last.
    """

    name: str
    turns: list[Turn]


def read_questions(path: str | Path, system: str | None = None) -> list[Question]:
    """Reads a JSON Lines file of questions.

    A line is {"text": ...}, {"audio": FILE} or {"turns": [{"role": ..., "text" or "audio" or "codes": ...}, ...]}, each
    with an optional "id". Audio paths are relative to the folder of the file. Empty lines are skipped.

    Args:
        system: the text of a system turn for the questions that have none.

    Raises:
        MossError: the file has no question, or names the first line that is invalid.
    """
    path = Path(path)
    questions: dict[str, Question] = {}
    for line in read_lines(path):
        with located(f"{path} line {line.number}"):
            question = _question(parse_object(line.content), line.number, path.parent, system)
            if question.name in questions:
                raise MossError(f"duplicate id {shown(question.name)}")
            questions[question.name] = question
    if not questions:
        raise MossError(f"{path}: no questions, expected one JSON object per line")
    return list(questions.values())


def _question(entry: dict[str, Any], number: int, folder: Path, system: str | None) -> Question:
    name = plain_name(entry.pop("id", f"{number:05d}"))
    if "turns" in entry:
        turns = entry.pop("turns")
        if entry or not isinstance(turns, list):
            raise MossError("'turns' must be a list, and only 'id' is allowed next to it")
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
    path = None if audio is None else folder / audio
    codes = entry.get("codes")
    if codes is not None:
        codes = code_list(codes)
    return Turn(entry.get("role", "user"), text=entry.get("text"), audio=path, codes=codes)
