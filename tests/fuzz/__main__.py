"""Runs fuzz targets for a given time.

  python -m tests.fuzz                                     # every target, one minute each
  python -m tests.fuzz audio lines --minutes 5 --memory-gib 2 -o FINDINGS
  python -m tests.fuzz audio --replay FINDINGS/audio-1a2b3c4d/case.pickle

Exit code 1: an exception other than MossError was raised, a case took more than 20 s, a process crashed, or one used
more memory than allowed. Each such finding is a folder with the case, its files and the traceback. Linux only.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.fuzz import TARGETS
from tests.fuzz.hunt import GIB, hunt, replay


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(TARGETS)}; default all")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each target, default 1")
    parser.add_argument("--memory-gib", type=float, default=2.0, help="resident memory allowed, default 2")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch of cases, default 0")
    parser.add_argument("-o", "--out", type=Path, help="folder for findings, default a new temporary one")
    parser.add_argument("--replay", type=Path, metavar="CASE", help="run one saved case of the one TARGET")
    args = parser.parse_args()
    unknown = [target for target in args.targets if target not in TARGETS]
    if unknown:
        parser.error(f"unknown target {', '.join(unknown)}; expected one of {', '.join(TARGETS)}")
    if args.replay is not None:
        if len(args.targets) != 1:
            parser.error("--replay needs one TARGET, that of the case")
        with tempfile.TemporaryDirectory() as folder:
            replay(f"tests.fuzz.{args.targets[0]}", args.replay, Path(folder))
        return 0
    out = args.out or Path(tempfile.mkdtemp(prefix="moss-jax-findings-"))
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    for target in args.targets or TARGETS:
        result = hunt(f"tests.fuzz.{target}", 60 * args.minutes, int(args.memory_gib * GIB), out, args.seed)
        failed = failed or bool(result.findings) or not result.cases
        print(f"{target}: {result.cases} cases, {len(result.findings)} findings, peak {result.peak / GIB:.2f} GiB")
        for finding in result.findings:
            print(f"  {finding.what}\n    {finding.folder}")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
