"""Benchmarks of fadiag_fast: one file per claim, rows in results/, tables made from the rows."""
