"""Compare components with golden files: numeric references made with the PyTorch implementation.

  moss-jax parity golden/lm/*.safetensors golden/codec/*.safetensors

One row for each output that a file declares final. Exit code 0: all within tolerance; 1: something is not, or nothing
was compared; 2: a file cannot be read.
"""

from moss_jax.cli.clone import import_dev
from moss_jax.cli.system_arguments import say
from moss_jax.errors import MossError


def add_arguments(parser):
    parser.add_argument("files", nargs="+", metavar="FILE.safetensors")


def run(args) -> int:
    import jax

    parity = import_dev("parity")
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
