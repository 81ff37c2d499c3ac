"""Files that are almost what the package reads, made by the thousand, and what it makes of them.

Whole files of every format are damaged or given hostile pickles (files, damage, hostile). A process
of its own reads them under limits and with an audit hook (reading) and compares what it gets with
what the libraries that the formats belong to make of the same bytes (oracles). Each file is made
from a seed and a number, so that one that fails can be made again:

    PYTHONPATH=tests python -m fuzzing --count 2000 --seed 0
    PYTHONPATH=tests python -m fuzzing --seed 0 --only 1234 --keep folder
"""
