"""Train the rules of a study, audit every checkpoint and compare strategies of judging them."""

from .running import RunRecord, StepRecord, StudyProgress, StudyResult, run_study
from .suites import SUITES, StudyModel, Suite, load_suite
from .tables import decision_table, first_fired, threshold_gaps, write_tables

__all__ = [
    "SUITES",
    "RunRecord",
    "StepRecord",
    "StudyModel",
    "StudyProgress",
    "StudyResult",
    "Suite",
    "decision_table",
    "first_fired",
    "load_suite",
    "run_study",
    "threshold_gaps",
    "write_tables",
]
