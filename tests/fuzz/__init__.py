"""Fuzzing: mutated and generated input for every reader of the package.

A target is a module with a hypothesis strategy `CASES` and a function `run(case, folder)`. A case is plain data that
can be pickled; `run` writes its files into the empty `folder` and calls the package. It returns or raises
MossError; anything else is a finding. `tests/fuzz/test_fuzz.py` runs a few cases of every target,
`python -m tests.fuzz` as many as fit into the given time.
"""

TARGETS = ("audio", "tensors", "lines", "systems", "text", "sampling")
