"""Memory that is freed is there again without a page fault."""

import subprocess
import sys

import pytest

PAGES = """
import resource, sys
import numpy as np
from moss_jax.train.host_memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("impossible")

def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        np.ones(2**24, np.float32)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(2)
print(faults(10))
"""


def page_faults(what):
    done = subprocess.run([sys.executable, "-c", PAGES, what], capture_output=True, text=True)
    if "impossible" in done.stderr:
        pytest.skip("no glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_kept():
    assert page_faults("keep") < page_faults("plain") / 10
