"""Ahead-of-time compilation for TPU topologies without a TPU: memory of a chip and collectives of a model function.

`compile_function(CompileRequest("decode", topology="v5e:2x4"))` returns what `moss-jax compile` prints.
"""

from moss_jax.compile.process import compile_function
from moss_jax.compile.request import FUNCTIONS, MODEL_SIZES, CompileRequest

__all__ = ["FUNCTIONS", "MODEL_SIZES", "CompileRequest", "compile_function"]
