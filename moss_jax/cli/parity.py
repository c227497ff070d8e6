"""Compare components with golden files: reference outputs of the PyTorch implementation.

  moss-jax parity golden/lm/*.safetensors golden/codec/*.safetensors

Prints one row for each output that a file declares final. Exit code 0: all are within tolerance; 1: some are not, or
nothing was compared; 2: a file cannot be read.
"""

import argparse

from moss_jax.cli.clone import import_dev
from moss_jax.cli.system_arguments import say
from moss_jax.errors import MossError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE.safetensors", help="golden files")


def run(args: argparse.Namespace) -> int:
    import jax

    parity = import_dev("parity")
    # The default of TPUs and some GPUs multiplies float32 matrices in fewer bits than the tolerances allow.
    jax.config.update("jax_default_matmul_precision", "highest")
    unreadable = False
    checks = []
    row = "{:<28} {:<46} {:>9} {:>10} {:>9}  {}"
    print(row.format("file", "output", "compared", "worst", "of tol.", ""))
    for file in args.files:
        try:
            golden = parity.read_golden(file)
        except MossError as error:
            say(f"moss-jax parity: {error}")
            unreadable = True
            continue
        for check in parity.check_golden(golden):
            checks.append(check)
            numbers = (check.compared, f"{check.worst:.2e}", f"{check.excess:.3f}")
            verdict = "pass" if check.passed else " ".join(["MISS", check.note]).strip()
            print(row.format(golden.path.stem[-28:], check.output[-46:], *numbers, verdict), flush=True)
    missed = sum(not check.passed for check in checks)
    print(f"{len(checks)} outputs compared, {missed} missed" + (", some files unreadable" if unreadable else ""))
    return 2 if unreadable else int(missed > 0 or not checks)
