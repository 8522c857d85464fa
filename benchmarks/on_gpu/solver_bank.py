"""Solvers on the problem bank beside torchdeq's, on the device: the rows of benchmarks/solvers.py."""

import functools
from collections.abc import Callable, Mapping

import torch

from benchmarks.on_gpu.cells import Cell
from benchmarks.on_gpu.correctness import moved
from benchmarks.on_gpu.setup import Setup
from benchmarks.solvers import PROBLEMS, Result, measure, ours, torchdeq
from solvers.testing import BANK

SOLVERS = ("picard", "anderson 5", "anderson 10", "broyden", "auto")


def compare(problem: str, solver: str, setup: Setup) -> Mapping[str, object]:
    """Calls, time and residual of ours and of torchdeq's solver of that name."""
    there = moved(BANK[problem](torch.float32), setup.device)
    runs = [family[solver] for family in (ours(there), torchdeq(there)) if solver in family]
    found = measure(there, [functools.partial(_finished, run, setup) for run in runs], repeats=1 if setup.toy else 7)
    values: dict[str, object] = {}
    for name, row in zip(("", "torchdeq "), found, strict=False):
        values |= {f"{name}calls": row.calls, f"{name}ms": row.ms, f"{name}residual": row.residual}
    if len(found) == 2:
        mine, theirs = found
        values["ours faster"] = theirs.ms / mine.ms if theirs.converged else "not converged"
    return values


def _finished(run: Callable[[], Result], setup: Setup) -> Result:
    result = run()
    if setup.cuda:
        torch.cuda.synchronize()
    return result


def cells(setup: Setup) -> list[Cell]:
    return [
        Cell(
            section="solvers",
            table="Solvers to 1e-5 in float32, beside torchdeq where it is installed",
            labels={"problem": problem, "solver": solver},
            run=functools.partial(compare, problem, solver, setup),
            rank=8,
            seconds=2.0,
        )
        for problem in setup.some(PROBLEMS)
        for solver in SOLVERS
    ]
