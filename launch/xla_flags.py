#!/usr/bin/env python3
"""XLA flags by name, each with its reason. Needs nothing but Python.

    eval "$(python3 launch/xla_flags.py tpu)"     sets the environment of the next command
    python3 launch/xla_flags.py --list            every set, flag and reason

TPU flags go into LIBTPU_INIT_ARGS, the others into XLA_FLAGS; what is there already stays, behind ours, so that it
wins. tests/test_launch.py hands every flag to the parser that reads it; libtpu 0.0.42.1 and jaxlib 0.10.2 know them.
None has been timed on real chips by this project: measure a step with and without before you keep one.
"""

import argparse
import os
import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    name: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


@dataclass(frozen=True)
class FlagSet:
    variable: str  # of the environment
    what: str
    flags: tuple[Flag, ...]


ASYNC_TPU = (
    Flag("xla_tpu_enable_latency_hiding_scheduler", "true", "start collectives early, wait for them late"),
    Flag("xla_tpu_enable_async_collective_fusion", "true", "collectives of fsdp run beside matrix products"),
    Flag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "also the gathering of fsdp parameters"),
    Flag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", "a gather may span several products"),
    Flag("xla_tpu_overlap_compute_collective_tc", "true", "products and collectives share the tensor core's time"),
    Flag("xla_enable_async_all_gather", "true", "gathers of parameters may be asynchronous at all"),
)
SETS = {
    "tpu": FlagSet("LIBTPU_INIT_ARGS", "one slice, parameters divided by fsdp", ASYNC_TPU),
    "tpu-multislice": FlagSet(
        "LIBTPU_INIT_ARGS",
        "several slices: gradients are also summed over the network between them",
        (
            *ASYNC_TPU,
            Flag("xla_tpu_enable_data_parallel_all_reduce_opt", "true", "sums over slices overlap the backward pass"),
            Flag("xla_tpu_data_parallel_opt_different_sized_ops", "true", "the same for gradients of unlike sizes"),
            Flag("xla_tpu_enable_megascale_barrier", "true", "slices wait for each other at the start"),
            Flag("xla_max_concurrent_host_send_recv", "100", "many transfers between slices at once"),
        ),
    ),
    "tpu-v6e": FlagSet(
        "LIBTPU_INIT_ARGS",
        "as tpu, for v6e",
        (
            *ASYNC_TPU,
            Flag(
                "xla_tpu_scoped_vmem_limit_kib",
                "98304",
                "96 MiB of vector memory for a fusion: MaxText's value",
            ),
        ),
    ),
    "gpu": FlagSet(
        "XLA_FLAGS",
        "one host, or one card",
        (
            Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "start collectives early, wait for them late"),
            Flag(
                "xla_gpu_enable_triton_gemm",
                "false",
                "cuBLAS for every product: compiles sooner",
            ),
        ),
    ),
    "gpu-hosts": FlagSet(
        "XLA_FLAGS",
        "several hosts",
        (
            Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "start collectives early, wait for them late"),
            Flag(
                "xla_gpu_enable_triton_gemm",
                "false",
                "cuBLAS for every product: compiles sooner",
            ),
            Flag("xla_gpu_enable_pipelined_all_gather", "true", "parameters of the next layer come meanwhile"),
            Flag("xla_gpu_enable_pipelined_reduce_scatter", "true", "gradients of the layer before leave meanwhile"),
            Flag("xla_gpu_all_gather_combine_threshold_bytes", "134217728", "few large messages over the network"),
            Flag("xla_gpu_reduce_scatter_combine_threshold_bytes", "134217728", "the same for gradients"),
            Flag("xla_gpu_all_reduce_combine_threshold_bytes", "134217728", "the same for sums"),
        ),
    ),
    "gpu-same": FlagSet(
        "XLA_FLAGS",
        "the same numbers in every run, slower: for comparing resumed runs bit by bit",
        (Flag("xla_gpu_deterministic_ops", "true", "no atomics, no choice of kernels by timing"),),
    ),
    "cpu-8": FlagSet(
        "XLA_FLAGS",
        "eight devices on a laptop, to try a mesh",
        (Flag("xla_force_host_platform_device_count", "8", "the CPU poses as eight devices"),),
    ),
}


def export_line(name: str, environment: dict[str, str]) -> str:
    """The shell line that sets the variable of a set, keeping what is in it."""
    chosen = SETS[name]
    value = " ".join([*map(str, chosen.flags), *environment.get(chosen.variable, "").split()])
    return f"export {chosen.variable}={shlex.quote(value)}"


def listing() -> str:
    lines = []
    for name, chosen in SETS.items():
        lines.append(f"{name} ({chosen.variable}): {chosen.what}")
        lines += [f"  {flag}\n      {flag.reason}" for flag in chosen.flags]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", nargs="?", choices=list(SETS), help="which one")
    parser.add_argument("--list", action="store_true", help="print every set with its reasons")
    args = parser.parse_args()
    if args.list or args.set is None:
        print(listing())
    else:
        print(export_line(args.set, dict(os.environ)))


if __name__ == "__main__":
    main()
