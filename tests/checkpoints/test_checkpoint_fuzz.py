"""Damaged and hostile files of every format: refused, or exactly what their own library reads.

What is checked of each is in `fuzzing`, which also says how to make one file again.
"""

from __future__ import annotations

import sys

import pytest
from fuzzing.running import run

pytest.importorskip("safetensors")
pytest.importorskip("pyarrow")
pytest.importorskip("pandas")
pytest.importorskip("tomllib")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")


def test_200_files() -> None:
    outcome = run(0, list(range(200)))
    assert not outcome.wrong
    assert outcome.total == 200
    # Neither may all be refused, nor all be whole.
    ends = {how: sum(counts[how] for counts in outcome.counts.values()) for how in _ENDS}
    assert all(ends.values()), ends


_ENDS = ("refused", "read", "read in part")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_2000_files(seed: int) -> None:
    outcome = run(seed, list(range(2000)))
    assert not outcome.wrong, "\n".join(outcome.wrong)
    assert outcome.total == 2000
