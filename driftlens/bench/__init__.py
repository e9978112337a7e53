"""Benchmarks: cases x arms (an editor and its restrictions), each finished unit kept at once.

A unit is one case under one arm. Its identity holds what was asked for: model and weights, case,
editor, restrictions, seed. So a run that was killed goes on where it was, and a changed
configuration is another unit. The last bits of a result also depend on what is not in it: which
cases share passes (those of the run), and the number of threads. Nor is the code: a unit of other
versions is kept, with a warning. A folder of results holds

    bench.json    what the latest run was asked for, with versions
    cases.jsonl   its cases
    units.jsonl   every finished unit, in the order in which they were finished

``arms.py`` makes arms, ``units.py`` says what a unit is and computes it, ``run.py`` runs what is
missing, and ``results.py`` reads a folder.
"""

from driftlens.bench.arms import UNEDITED, Arm, arm_from_dict, make_arms
from driftlens.bench.results import BenchResult
from driftlens.bench.run import run_bench
from driftlens.bench.units import (
    CASES_AT_ONCE,
    Executor,
    Job,
    LocalExecutor,
    Setting,
    edits_of,
    parts,
    run_job,
)

__all__ = [
    "CASES_AT_ONCE",
    "UNEDITED",
    "Arm",
    "BenchResult",
    "Executor",
    "Job",
    "LocalExecutor",
    "Setting",
    "arm_from_dict",
    "edits_of",
    "make_arms",
    "parts",
    "run_bench",
    "run_job",
]
