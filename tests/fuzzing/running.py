"""Run the reading of many files, start it again behind a file that ends it, and count."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Without a word from the process, for one file; a busy machine has many of these processes.
SILENCE_SECONDS = 60


@dataclass
class Outcome:
    """What came of files.

    Attributes:
        counts: how many of each kind ended how.
        wrong: what was wrong, in words, with the number that makes the file again.
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def add(self, kind: str, how: str) -> None:
        self.counts.setdefault(kind, Counter())[how] += 1

    @property
    def total(self) -> int:
        return sum(sum(counts.values()) for counts in self.counts.values())

    def table(self) -> str:
        hows = sorted({how for counts in self.counts.values() for how in counts})
        rows = [("kind", *hows)]
        rows += [
            (kind, *(str(counts[how]) for how in hows))
            for kind, counts in sorted(self.counts.items())
        ]
        rows.append(("all", *(str(sum(c[how] for c in self.counts.values())) for how in hows)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
        )


def run(seed: int, numbers: list[int], keep: Path | None = None) -> Outcome:
    """Make and read files in a process of its own.

    Args:
        seed, numbers: they make the files.
        keep: a folder in which they are left.
    """
    found = Outcome()
    while numbers:
        numbers = _run_once(seed, numbers, keep, found)
    return found


def _run_once(seed: int, numbers: list[int], keep: Path | None, found: Outcome) -> list[int]:
    """Read until a file ends the process; return the numbers that are left."""
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), str(root.parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    out, into = os.pipe()
    arguments = {"seed": seed, "numbers": numbers, "keep": keep and str(keep), "out": into}
    process = subprocess.Popen(
        [sys.executable, "-m", "fuzzing.child"],
        env=env,
        pass_fds=[into],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    os.close(into)
    assert process.stdin is not None
    process.stdin.write(json.dumps(arguments))
    process.stdin.close()
    begun: dict[str, Any] | None = None
    done, hung = 0, False
    with open(out, "rb", buffering=0) as pipe:
        pending = b""
        while True:
            ready, _, _ = select.select([pipe], [], [], SILENCE_SECONDS)
            data = pipe.read(1 << 16) if ready else b""
            hung = not ready
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "outcome" not in said:
                    begun = said
                    continue
                assert begun is not None
                if said["outcome"] == "wrong":
                    found.wrong.append(_told(seed, begun, said["what"]))
                if begun["number"] >= 0:
                    found.add(begun["kind"], said["outcome"])
                    done += 1
                begun = None
    if hung:
        process.kill()
    code = process.wait()
    if begun is not None:
        what = f"no end within {SILENCE_SECONDS} s" if hung else f"the process ended with {code}"
        found.wrong.append(_told(seed, begun, what))
        if begun["number"] < 0:
            return []
        found.add(begun["kind"], "wrong")
        return numbers[done + 1 :]
    if code:
        found.wrong.append(f"the process ended with {code} between files")
        return []
    return numbers[done:]


def _told(seed: int, begun: dict[str, Any], what: str) -> str:
    return f"seed {seed}, number {begun['number']}: {begun['kind']}, {begun['how']}: {what}"
