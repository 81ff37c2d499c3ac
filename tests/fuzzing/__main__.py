"""Read many damaged files and print what came of them; exit with 1 if anything is wrong."""

import argparse
import sys
from pathlib import Path

from .running import run

parser = argparse.ArgumentParser(prog="python -m fuzzing", description=__doc__)
parser.add_argument("--count", type=int, default=2000, help="files")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--only", type=int, help="the number of one file")
parser.add_argument("--keep", type=Path, help="a folder in which the files are left")
arguments = parser.parse_args()
chosen = list(range(arguments.count)) if arguments.only is None else [arguments.only]
outcome = run(arguments.seed, chosen, arguments.keep)
print(outcome.table())
print(f"{outcome.total} files, {len(outcome.wrong)} wrong")
for text in outcome.wrong:
    print(f"- {text}")
sys.exit(bool(outcome.wrong))
