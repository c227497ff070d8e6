"""Counts the collectives in the text of a compiled HLO module."""

import re
from collections.abc import Sequence

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Computations = dict[str, list[str]]  # name of a computation -> its instructions, a line each


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}}: how often a collective runs, and the bytes of its results on one chip.

    Instructions in a loop with a known number of iterations (the layers) count that many times. The body of any other
    loop (rows of a reply, chunks of a prompt) counts once, and every branch of a conditional counts once. A collective
    that overlaps other work appears in several fusions, as its start, middle and end: such a chain counts once.
    """
    computations, entry = _parse(hlo)
    total: dict[str, dict[str, int]] = {}

    def visit(computation: str, times: int, chains: set[str]) -> None:
        for line in computations.get(computation, ()):
            operation = re.search(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            chain = re.search(r'chain_id="(\d+)"', line)
            if operation and not (chain and chain[1] in chains):
                chains.update(chain.groups() if chain else ())
                counts = total.setdefault(operation[2], {"count": 0, "bytes": 0})
                counts["count"] += times
                counts["bytes"] += times * _result_bytes(operation[1], operation[2], bool(operation[3]))
            for callee, iterations, is_loop in _calls(line, computations):
                visit(callee, times * iterations, set() if is_loop else chains)

    visit(entry, 1, set())
    return total


def _parse(hlo: str) -> tuple[Computations, str]:
    """The computations of a module and the name of its entry."""
    computations: Computations = {}
    entry = ""
    name = ""
    for line in hlo.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif name and line.startswith(" "):
            computations[name].append(line)
    return computations, entry


def _calls(line: str, computations: Computations) -> list[tuple[str, int, bool]]:
    """The computations that an instruction calls: (name, number of times, whether it is the body of a loop)."""
    if re.search(r" async-(update|done)\(", line):  # the computation was already counted at the start
        return []
    called = [(callee, 1, False) for callee in re.findall(r"(?:calls|to_apply|_computation)=%?([\w.\-]+)", line)]
    for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", line):
        called += [(callee.strip().lstrip("%"), 1, False) for callee in group.split(",")]
    loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if loop:
        condition = computations.get(loop[1], [])
        body = computations.get(loop[2], [])
        called.append((loop[2], _iterations(line, condition, body), True))
    return called


def _iterations(line: str, condition: Sequence[str], body: Sequence[str]) -> int:
    """Iterations of a loop; 1 where they are not known.

    The compiler may note them. Otherwise they are N / step, if the condition is `counter < N` and nothing else and the
    body adds a constant step to the counter.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    simple = ("parameter", "get-tuple-element", "constant", "compare")
    others = [text for text in condition if not re.search(rf" ({'|'.join(simple)})\(", text)]
    limits = [match[1] for text in condition if (match := re.search(r" constant\((\d+)\)", text))]
    counts_up = any("direction=LT" in text for text in condition)
    if not counts_up or len(limits) != 1 or others:
        return 1
    return -(-int(limits[0]) // _counter_step(condition, body))


def _counter_step(condition: Sequence[str], body: Sequence[str]) -> int:
    """What an iteration adds to the loop's counter; 1 where the body does not show it.

    The rings in which XLA passes weights from chip to chip are loops that are unrolled by two.
    """
    index = _first_match(r"get-tuple-element\(.*index=(\d+)", condition)
    result = _first_match(r"ROOT .* tuple\((.*?)\)(?:,|$)", body)
    if index is None or result is None:
        return 1
    counter = dict(enumerate(re.findall(r"%([\w.\-]+)", result))).get(int(index), "")
    addition = _first_match(rf"%{re.escape(counter)} = .* add\(([^)]*)\)", body) or ""
    for operand in re.findall(r"%([\w.\-]+)", addition):
        step = _first_match(rf"%{re.escape(operand)} = .* constant\((\d+)\)", body)
        if step is not None:
            return int(step)
    return 1


def _first_match(pattern: str, lines: Sequence[str]) -> str | None:
    """The first group of `pattern` in the first line that it matches."""
    return next((match[1] for line in lines if (match := re.search(pattern, line))), None)


def _result_bytes(shapes: str, kind: str, is_start: bool) -> int:
    """Bytes of a result. An asynchronous start lists operand and result, but an all-reduce its results only."""
    sizes = []
    for dtype, bits, dims in re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shapes):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        sizes.append(count * (8 if dtype == "pred" else int(bits)) // 8)
    return max(sizes) if is_start and kind != "all-reduce" else sum(sizes)
