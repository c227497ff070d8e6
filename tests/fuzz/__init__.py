"""Fuzzing: mutated and invented input for every reader of the package.

A target is a module with a hypothesis strategy `CASES` and a function `run(case, folder)`. A case is plain data that
can be pickled; `run` writes what it needs into `folder`, which is empty, and calls the package. It returns, or raises
MossError; anything else is a finding. `tests/fuzz/test_fuzz.py` runs a few cases of every target, and
`python -m tests.fuzz` as many as there is time for.
"""

TARGETS = ("audio", "tensors", "lines", "systems", "text", "sampling")
