"""Code style that neither the linter nor the type checker checks; docs/developing.md explains the rules."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT / "docs" / "developing.md"
LIBRARY_NAMES = {"most_common", "tell"}  # collections.Counter.most_common, the tell() of files


def python_files() -> list[Path]:
    folders = ("moss_jax", "dev", "tests", "configs", "launch", "notebooks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def banned_words() -> dict[str, str]:
    """The last column of the glossary: {word banned from identifiers, also as a part of one: term to use instead}."""
    section = GLOSSARY.read_text(encoding="utf-8").split("## Glossary", 1)[1].split("\n## ", 1)[0]
    banned = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3:
            for word in re.findall(r"`(\w+)`", cells[2]):
                banned[word] = cells[0]
    return banned


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, identifier) of every name in the code: definitions, variables, attributes, parameters and keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.value.lineno, node.arg


def parts(identifier: str) -> set[str]:
    """The identifier itself and its words: `_said_so` and `SaidSo` -> said_so, said, so."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().strip("_")
    return {snake, *snake.split("_")}


def packed_assignments(tree: ast.AST) -> Iterator[int]:
    """Lines of statements that assign a tuple of values to a tuple of names. Swaps are allowed."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Tuple | ast.List) and isinstance(node.value, ast.Tuple | ast.List):
                names = {ast.unparse(element) for element in target.elts}
                values = {ast.unparse(part) for part in ast.walk(node.value) if isinstance(part, ast.expr)}
                if not names & values:
                    yield node.lineno


def test_the_glossary_is_read():
    banned = banned_words()
    assert banned["told"] and banned["begun"] and banned["ear"]
    assert {"said", "goes_on", "lane", "beside", "moved", "narrow", "emptied"} <= set(banned)


@pytest.mark.parametrize(
    ("code", "expected"),
    [("a, b = 1, 2", [1]), ("a, b = b, a", []), ("a, b = f()", []), ("x = 1\nself.a, (b) = 1, 2", [2])],
)
def test_packed_assignments_are_recognised(code, expected):
    assert list(packed_assignments(ast.parse(code))) == expected


def test_one_assignment_a_statement():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in python_files()
        for line in packed_assignments(ast.parse(path.read_text()))
    ]
    assert found == []


def test_identifiers_are_terms_of_the_field():
    banned = banned_words()
    problems = []
    for path in python_files():
        for line, identifier in identifiers(ast.parse(path.read_text(encoding="utf-8"))):
            if identifier in LIBRARY_NAMES:
                continue
            for word in parts(identifier) & set(banned):
                problems.append(f"{path.relative_to(ROOT)}:{line}: {identifier} ({banned[word]} instead of {word})")
    assert problems == []


def test_the_formatter_is_never_switched_off():
    marker = re.compile(r"#\s*fmt:\s*(skip|off|on)")
    found = [str(path.relative_to(ROOT)) for path in python_files() if marker.search(path.read_text(encoding="utf-8"))]
    assert found == []
