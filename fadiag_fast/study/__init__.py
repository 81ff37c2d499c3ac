"""Train the rules of a study, audit every checkpoint and compare strategies of judging them."""

from .progress import StudyProgress
from .records import AuditedStep, RunRecord, StudyResult
from .running import run_study
from .suites import SUITES, StudyModel, Suite, load_suite
from .tables import decision_table, first_fired, threshold_gaps, write_tables

__all__ = [
    "SUITES",
    "AuditedStep",
    "RunRecord",
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
