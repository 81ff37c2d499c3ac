"""What can be wrong with a folder of results."""

from __future__ import annotations


class ResultsError(RuntimeError):
    """Report that a scan's folder cannot be used as asked."""


class UnreadableResults(ResultsError):
    """Report a folder without a scan in it, or with a damaged one."""


class NewerResults(ResultsError):
    """Report rows that a later version of fadiag_fast has written."""


class UnwritableResults(ResultsError):
    """Report that rows could not be written; those written before are as readable as ever."""


class LockedResults(ResultsError):
    """Report that another scan is writing into the folder."""
