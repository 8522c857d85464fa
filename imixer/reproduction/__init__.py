"""The experiments of the iMixer paper, and those of this library on solvers, backward modes and depth.

`imixer-reproduce` is the command line; docs/reproduction.md says how to use it. A trial is one configuration with one
seed, in a folder of its own, which is resumed where it was stopped and never run twice.
"""

from imixer.reproduction.engines import run_here, run_in_processes, run_on_ray, shard
from imixer.reproduction.report import print_tables, tables_of, write_report
from imixer.reproduction.run_trial import Ending, Task, run_trial
from imixer.reproduction.scales import SCALES, Scale
from imixer.reproduction.statistics import Estimate, estimate, paired_difference
from imixer.reproduction.sweep import EXPERIMENTS, Sweep
from imixer.reproduction.trial import Trial

__all__ = [
    "EXPERIMENTS",
    "Ending",
    "Estimate",
    "SCALES",
    "Scale",
    "Sweep",
    "Task",
    "Trial",
    "estimate",
    "paired_difference",
    "print_tables",
    "run_here",
    "run_in_processes",
    "run_on_ray",
    "run_trial",
    "shard",
    "tables_of",
    "write_report",
]
