"""Text documents from outside the program: JSON, JSON lines and YAML.

Every reader of the package uses these functions, so that the same limits and the same messages apply everywhere. A
malformed document is one MossError. What a document must contain is checked by its reader, mostly with
`moss_jax.checkpoint.config_io.read_config`.
"""

import contextlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moss_jax import errors
from moss_jax.errors import MossError

MAX_FILE = 256 * 2**20  # bytes of a JSON file; the tokenizer.json of a large vocabulary has 11 MB
MAX_LINE = 64 * 2**20  # bytes of a line; the codes of an hour of speech have 0.3 MB
MAX_YAML = 2**20  # bytes; the YAML parser is slow
PIECE = 2**18  # bytes read at a time
MAX_DEPTH = 64  # nested lists and objects
MAX_DIGITS = 300  # of a whole number; a longer one does not fit a float
MAX_NAME = 200  # bytes of an id; most file systems allow 255 for a file name, some of which is an ending
BOM = b"\xef\xbb\xbf"  # of UTF-8; editors on Windows write it
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of half a UTF-16 pair
# A string, closed or not, so that the search is linear; or a bracket.
TOKEN = re.compile(r'"(?:\\.|[^"\\])*+"?|[][{}]', re.DOTALL)
REFERENCE = re.compile(r"\s*<(\w+)>\s*")  # what follows `!ref` where it is a plain name


@dataclass(frozen=True)
class Line:
    """One line of a file.

    Attributes:
        number: from 1.
        start: offset of its first byte in the file.
        content: its bytes without white space at both ends, at least one.
    """

    number: int
    start: int
    content: bytes


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises MossError when there is none."""
    with located(path):
        return parse_object(read_bytes(path, MAX_FILE))


def read_text(path: str | Path) -> str:
    """A UTF-8 file as text, without its byte-order mark. Raises MossError when it cannot be read."""
    with located(path):
        return decode(read_bytes(path, MAX_FILE))


def read_lines(path: str | Path) -> Iterator[Line]:
    """The lines of a file that are not blank, one at a time.

    Only b"\\n" ends a line (a b"\\r" before it is dropped): a JSON string may hold other line separators, such as
    U+2028. A byte-order mark at the beginning is dropped.

    Raises:
        MossError: the file cannot be read, or a line has more than MAX_LINE bytes.
    """
    try:
        with open(path, "rb") as file:
            start = 0
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise MossError(f"{path} line {number}: longer than {MAX_LINE} bytes, expected a JSON object")
                skipped = len(BOM) if number == 1 and line.startswith(BOM) else 0
                if content := line[skipped:].strip():
                    yield Line(number, start + skipped, content)
                start += len(line)
    except MossError:
        raise
    except (OSError, ValueError) as error:
        raise MossError(f"{path}: {_reason(error)}") from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in a text. Raises MossError, without a place in its message, when there is none."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise MossError(f"holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The JSON value in a text, bytes in UTF-8 with or without a byte-order mark.

    Besides malformed text, these are refused: nesting deeper than MAX_DEPTH, whole numbers of more than MAX_DIGITS
    digits, floats that are infinite or not a number, a key that appears twice in one object, half a UTF-16 pair in a
    string.

    Args:
        finite: False also takes NaN and Infinity, which Python writes into its own JSON.

    Raises:
        MossError: without a place in its message; `located` adds it.
    """
    if isinstance(text, bytes):
        text = decode(text)
    try:
        value = json.loads(
            text,
            parse_int=_whole,
            parse_float=_finite if finite else float,
            parse_constant=_finite if finite else float,
            object_pairs_hook=_distinct,
        )
    except RecursionError:
        raise MossError(f"nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        # Newer Pythons parse much deeper text before they give up, and then complain about what is at its bottom.
        if _depth(text[: error.pos]) > MAX_DEPTH:
            raise MossError(f"nested deeper than {MAX_DEPTH} levels") from None
        line = f"line {error.lineno} " if "\n" in text.strip() else ""
        raise MossError(f"not valid JSON ({error.msg} at {line}column {error.colno})") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if SURROGATE.search(text):
        _check_strings(value)
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, empty for an empty file.

    It holds plain values only: nothing that the file names is imported or built.

    The tags of HyperPyYAML are understood as far as values go. `!new:`, `!name:`, `!apply:` and others are dropped and
    what follows them is kept; `!ref <name>` is replaced by the value that the file has under `name` at its top level.
    Any other `!ref` stays the text that it is.

    Raises:
        MossError: the file cannot be read, is not YAML, or is nested deeper than MAX_DEPTH.
    """
    with located(path):
        text = decode(read_bytes(path, MAX_YAML))
        try:
            depth = 0
            for event in yaml.parse(text, _PlainLoader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > MAX_DEPTH:
                    raise MossError(f"nested deeper than {MAX_DEPTH} levels")
            value = _PlainLoader(text).read()
        except RecursionError:
            raise MossError("has references that are nested too deep") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
            raise MossError(f"not valid YAML ({error.problem}{place})") from error
        except yaml.YAMLError as error:  # characters that YAML does not allow
            raise MossError(f"not valid YAML ({str(error).splitlines()[0]})") from error
        except MossError:
            raise
        except (ValueError, OverflowError) as error:  # of a date or a number
            raise MossError(f"a value in it cannot be read ({str(error)[:80]})") from error
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise MossError(f"holds a YAML {type(value).__name__}, expected a mapping")
        return value


@contextlib.contextmanager
def located(where: str | Path) -> Iterator[None]:
    """Puts the name of a file, or of a place in it, in front of the message of every MossError in the block."""
    try:
        yield
    except MossError as error:
        raise MossError(f"{where}: {error}") from error


def decode(content: bytes) -> str:
    """Text from UTF-8, without a byte-order mark. Raises MossError."""
    try:
        return content.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        place = f"line {line}" if b"\n" in content.strip() else f"byte {error.start}"
        raise MossError(f"not UTF-8 text ({place})") from error


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises MossError without the name of the file."""
    try:
        content = bytearray()
        with open(path, "rb") as file:
            # By pieces: one read of `limit` bytes would allocate them all.
            while len(content) <= limit and (piece := file.read(PIECE)):
                content += piece
    except (OSError, ValueError) as error:
        raise MossError(_reason(error)) from error
    if len(content) > limit:
        raise MossError(f"has more than {limit} bytes, which is not expected of such a file")
    return bytes(content)


def shown(value: Any) -> str:
    """A value of a document for an error message, cut where it is long."""
    return "null" if value is None else errors.shown(value)


def short(name: Any) -> str:
    """A name for an error message, cut in the middle where it is long."""
    text = str(name)
    return text if len(text) <= 300 else f"{text[:100]}...{text[-100:]}"


def text_of(path: str | Path) -> str:
    """A path as proper text: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


def code_list(value: Any) -> list[int]:
    """A list of speech codes from JSON. Raises MossError, without a place in its message, when it is none."""
    numbers = value if isinstance(value, list) else []
    if not numbers or not all(type(code) is int and abs(code) < 2**31 for code in numbers):
        raise MossError(f"codes are {shown(value)}, expected at least one integer in a list")
    return numbers


def plain_name(value: Any) -> str:
    """The "id" of a line as a string that can name a file: a string or a whole number.

    Raises:
        MossError: it is of another type, has a folder in it, starts with a point, or is longer than MAX_NAME bytes.
    """
    name = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    plain = Path(name).name == name and not name.startswith(".") and "\0" not in name
    if not name or not plain or len(name.encode(errors="replace")) > MAX_NAME:
        raise MossError(f"id {shown(value)} is not a plain file name")
    return name


def check_encodable(text: str, what: str) -> None:
    """Raises MossError for text that UTF-8 cannot express; `what` it is opens the message.

    Such text comes from JSON escapes of half a UTF-16 pair, and from command lines that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MossError(
            f"{what} is not proper text at character {error.start} (a lone surrogate, from bytes that are not UTF-8 or "
            "half a UTF-16 pair), expected UTF-8"
        ) from error


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return f"is not a name that a file can have ({error})"


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise MossError(f"a number of {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise MossError(f"{text[:20]} is not a finite number")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise MossError(f"the key {shown(twice)} appears twice in one object")
    return value


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _depth(text: str) -> int:
    """How many lists and objects are open at the end of a part of a JSON text."""
    tokens = TOKEN.findall(text)
    return tokens.count("[") + tokens.count("{") - tokens.count("]") - tokens.count("}")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent) if isinstance(child, dict | list)]
        if not level:
            return
    raise MossError(f"nested deeper than {MAX_DEPTH} levels")


def _check_strings(value: Any) -> None:
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            check_encodable(value, f"the string {shown(value)}")
        else:
            stack += _children(value)


class _PlainLoader(yaml.SafeLoader):
    """Builds numbers, strings, lists and mappings, whatever tag is in front of them."""

    def __init__(self, text: str):
        super().__init__(text)
        self.top: dict[str, yaml.Node] = {}  # nodes by their name at the top level, for `!ref`

    def read(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        if isinstance(node, yaml.MappingNode):
            self.top = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        return self.construct_document(node)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leaves merge keys ("<<") alone: with them a small file grows to a large value."""


def _untagged(loader: _PlainLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    text = loader.construct_scalar(node)
    reference = REFERENCE.fullmatch(text)
    if suffix == "ref" and reference and reference[1] in loader.top:
        return loader.construct_object(loader.top[reference[1]], deep=True)
    return f"!{suffix} {text}".strip()


_PlainLoader.add_multi_constructor("!", _untagged)
# YAML 1.1 takes 1e-6 for a string, as it has no point.
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
