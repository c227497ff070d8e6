#!/usr/bin/env python3
"""Named sets of XLA flags, with the reason for each flag. Needs only the Python standard library.

    eval "$(python3 launch/xla_flags.py tpu)"     sets the environment of the next command
    python3 launch/xla_flags.py --list            lists every set, flag and reason

TPU flags are written to LIBTPU_INIT_ARGS, the others to XLA_FLAGS. Existing flags are kept after the new ones, so that
they take precedence. tests/test_launch.py checks that libtpu 0.0.42.1 and jaxlib 0.10.2 accept every flag. None of them
has been timed on real chips by this project: measure a step with and without a flag before relying on it.
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
    variable: str  # environment variable
    what: str
    flags: tuple[Flag, ...]


ASYNC_TPU = (
    Flag("xla_tpu_enable_latency_hiding_scheduler", "true", "start collectives early and wait for them late"),
    Flag("xla_tpu_enable_async_collective_fusion", "true", "collectives of fsdp overlap with matrix products"),
    Flag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", "including the all-gathers of fsdp parameters"
    ),
    Flag(
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "true",
        "an all-gather may overlap with several products",
    ),
    Flag("xla_tpu_overlap_compute_collective_tc", "true", "products and collectives share the tensor core"),
    Flag("xla_enable_async_all_gather", "true", "allow asynchronous all-gathers of parameters"),
)
SETS = {
    "tpu": FlagSet("LIBTPU_INIT_ARGS", "one slice, parameters sharded by fsdp", ASYNC_TPU),
    "tpu-multislice": FlagSet(
        "LIBTPU_INIT_ARGS",
        "several slices: gradients are also reduced over the network between them",
        (
            *ASYNC_TPU,
            Flag(
                "xla_tpu_enable_data_parallel_all_reduce_opt",
                "true",
                "all-reduces over slices overlap with the backward pass",
            ),
            Flag("xla_tpu_data_parallel_opt_different_sized_ops", "true", "the same for gradients of different sizes"),
            Flag("xla_tpu_enable_megascale_barrier", "true", "slices wait for each other at the start"),
            Flag("xla_max_concurrent_host_send_recv", "100", "many concurrent transfers between slices"),
        ),
    ),
    "tpu-v6e": FlagSet(
        "LIBTPU_INIT_ARGS",
        "the set tpu, for v6e",
        (
            *ASYNC_TPU,
            Flag(
                "xla_tpu_scoped_vmem_limit_kib",
                "98304",
                "96 MiB of vector memory per fusion, the value of MaxText",
            ),
        ),
    ),
    "gpu": FlagSet(
        "XLA_FLAGS",
        "one host or one GPU",
        (
            Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "start collectives early and wait for them late"),
            Flag(
                "xla_gpu_enable_triton_gemm",
                "false",
                "cuBLAS for every product, for shorter compilation",
            ),
        ),
    ),
    "gpu-hosts": FlagSet(
        "XLA_FLAGS",
        "several hosts",
        (
            Flag("xla_gpu_enable_latency_hiding_scheduler", "true", "start collectives early and wait for them late"),
            Flag(
                "xla_gpu_enable_triton_gemm",
                "false",
                "cuBLAS for every product, for shorter compilation",
            ),
            Flag("xla_gpu_enable_pipelined_all_gather", "true", "prefetch the parameters of the next layer"),
            Flag(
                "xla_gpu_enable_pipelined_reduce_scatter",
                "true",
                "send the gradients of the previous layer asynchronously",
            ),
            Flag("xla_gpu_all_gather_combine_threshold_bytes", "134217728", "fewer, larger messages over the network"),
            Flag("xla_gpu_reduce_scatter_combine_threshold_bytes", "134217728", "the same for gradients"),
            Flag("xla_gpu_all_reduce_combine_threshold_bytes", "134217728", "the same for all-reduces"),
        ),
    ),
    "gpu-same": FlagSet(
        "XLA_FLAGS",
        "bit-identical results in every run, but slower: for comparing resumed runs",
        (Flag("xla_gpu_deterministic_ops", "true", "no atomics, no autotuned choice of kernels"),),
    ),
    "cpu-8": FlagSet(
        "XLA_FLAGS",
        "eight devices on a laptop, for testing a mesh",
        (Flag("xla_force_host_platform_device_count", "8", "presents the CPU as eight devices"),),
    ),
}


def export_line(name: str, environment: dict[str, str]) -> str:
    """Returns the shell line that sets the variable of a set and keeps its current flags."""
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
    parser.add_argument("set", nargs="?", choices=list(SETS), help="name of the set")
    parser.add_argument("--list", action="store_true", help="print every set with its reasons")
    args = parser.parse_args()
    if args.list or args.set is None:
        print(listing())
    else:
        print(export_line(args.set, dict(os.environ)))


if __name__ == "__main__":
    main()
