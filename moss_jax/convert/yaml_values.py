"""The plain values in the codec's `flow/config.yaml`, a HyperPyYAML file that its own reader turns into objects.

Nothing is built here: tags such as `!new:` are passed over, only numbers, strings, booleans and lists of them are
taken, by line and indentation. What is written in another way is simply not found, and the caller has a default.
"""

import ast
import re
from typing import Any

LINE = re.compile(r"^(\s*)([A-Za-z_]\w*)\s*:(?:\s+(.*))?$")
REFERENCE = re.compile(r"^!ref\s+<(\w+)>$")


def yaml_values(text: str) -> dict[str, Any]:
    """{'flow.encoder.attention_heads': 8} for every plain value, keys joined from the outermost in."""
    values: dict[str, Any] = {}
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = LINE.match(re.sub(r"(^|\s)#.*$", "", line).rstrip())
        if not match:
            continue
        indent, key, rest = len(match[1]), match[2], (match[3] or "").strip()
        while stack and stack[-1][0] >= indent:
            stack.pop()
        stack.append((indent, key))
        path = ".".join(name for _, name in stack)
        if reference := REFERENCE.match(rest):
            if reference[1] in values:
                values[path] = values[reference[1]]
        elif rest and not rest.startswith(("!", "&", "*", "|", ">")):
            values[path] = _plain(rest)
    return values


def _plain(text: str) -> Any:
    names = {"true": True, "false": False, "null": None, "~": None}
    if text.lower() in names:
        return names[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
