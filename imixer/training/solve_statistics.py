"""Statistics of the solves in a training run."""

import contextlib
from pathlib import Path

from imixer.training.config import TrainingConfig
from imixer.training.learner import Learner
from imixer.training.reporting import Report
from implicit import monitor_solves
from implicit.diagnostics import SolveMonitor
from implicit.implicit_layer import ImplicitLayer
from solvers import Stopping

FILE = "solves.csv"


def monitored_solves(
    config: TrainingConfig, learner: Learner, folder: Path, report: Report, *, updates: int
) -> contextlib.AbstractContextManager[SolveMonitor | None]:
    """Within the context, record the solves of the first process in its trackers and in ``solves.csv``.

    It gives None where there is nothing to see: in other processes, in models that solve nothing or take a fixed number
    of steps, and where the solves are part of a graph.

    Args:
        config: The settings.
        learner: The model in training.
        folder: The run's folder.
        report: What writes to the trackers.
        updates: The updates that were made before.
    """
    layers = [module for module in learner.plain.modules() if isinstance(module, ImplicitLayer)]
    tested = any(isinstance(layer.stopping, Stopping) for layer in layers)
    if not (tested and learner.accelerator.is_main_process) or config.torchcompile or config.cuda_graph:
        return contextlib.nullcontext()
    return monitor_solves(
        learner.plain, tracker=report, csv_file=folder / FILE, every=config.log_interval, start=updates + 1
    )
