"""How far a study is, and how long it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is; ``asdict`` of it is a line of ``--json``.

    Attributes:
        run: "model/rule/seed_s".
        state: "training", "trained", "audited", "kept" (done in an earlier call) or "failed".
        done: runs that are finished, well or badly.
        total: runs of the suite.
        step: updates of this run so far.
        steps: updates of this run in all.
        rate: updates a second of all runs together, while any trained; 0 before the first.
        seconds_left: of training, estimated run by run from the same model and rule with another
            seed, or else from the average, and for as many runs at a time; 0 before the first.
    """

    run: str
    state: str
    done: int
    total: int
    step: int
    steps: int
    rate: float
    seconds_left: float
