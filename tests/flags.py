"""XLA flags for fast compilation: most of the time of the tests goes into compiling tiny models that run once.

The flags change how XLA's CPU backend generates code, not what is computed. MOSS_JAX_TEST_ISA (SSE4_2, AVX2, AVX512)
limits the instruction set, so that rounding is that of an older processor.
"""

import os
from importlib.metadata import version
from importlib.util import find_spec

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
QUICK += " --xla_cpu_parallel_codegen_split_count=1"
# This flag alone halves the time. An unknown flag ends the process: jaxlib 0.10 has it, 0.12 does not, and neither
# does libtpu, which reads the same variable.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11) and find_spec("libtpu") is None:
    QUICK += " --xla_cpu_use_fusion_emitters=false"
if ISA := os.environ.get("MOSS_JAX_TEST_ISA"):
    QUICK += f" --xla_cpu_max_isa={ISA}"


def devices(count: int) -> str:
    """XLA_FLAGS of a process with `count` CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={count}"
