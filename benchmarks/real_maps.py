"""Calls of the map that each solver needs on maps that people solve in practice.

python -m benchmarks.real_maps [--rtol 1e-6] [--dtype float64] [--max-steps 2000] [--maps NAME ...]

Prints a Markdown table of the maps in ``solvers.testing.REAL_MAPS``: the calls of f until every sample of the batch has
converged to the relative tolerance, or, where one has not, how the samples ended. The last column is the number of
calls that ``Auto`` needs as a multiple of the fewest of the others.
"""

import argparse
import math
import sys
from collections import Counter

if not __package__:
    # Started by its path, it would be imported instead of the package of the same name.
    sys.exit("Start it as a module: python -m benchmarks.real_maps")

import torch

from solvers import Anderson, Auto, Broyden, NewtonKrylov, Picard, Solution, Solver, Squarem, Status, solve
from solvers.testing import REAL_MAPS, RealMap

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "anderson 5": Anderson(),
    "anderson 10": Anderson(memory=10),
    "broyden": Broyden(),
    "squarem": Squarem(),
    "newton_krylov": NewtonKrylov(),
    "auto": Auto(),
}
# A step of Newton's method takes many calls; where it needs more steps than this, it is not the best.
MOST_NEWTON_STEPS = 50


def run(problem: RealMap, solver: Solver, rtol: float, max_steps: int) -> Solution:
    """The solution by one solver."""
    max_steps = min(max_steps, MOST_NEWTON_STEPS) if isinstance(solver, NewtonKrylov) else max_steps
    return solve(problem.f, problem.z0, solver, rtol=rtol, atol=0, max_steps=max_steps, on_failure="ignore")


def cell(solution: Solution) -> str:
    """The calls of f, and how many samples failed and how."""
    failed = Counter(Status(code).name for code in solution.status[solution.failed].tolist())
    return " ".join([str(solution.num_evals), *(f"{count} {name}" for name, count in failed.items())])


def calls(solution: Solution) -> float:
    """The calls of f; infinite where a sample failed."""
    return solution.num_evals if bool(solution.converged.all()) else math.inf


def row(name: str, problem: RealMap, rtol: float, max_steps: int) -> str:
    """One line of the table."""
    solutions = {solver: run(problem, instance, rtol, max_steps) for solver, instance in SOLVERS.items()}
    best = min(calls(solution) for solver, solution in solutions.items() if solver != "auto")
    ratio = calls(solutions["auto"]) / best if best < math.inf else math.nan
    cells = [name, *(cell(solution) for solution in solutions.values()), f"{ratio:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rtol", type=float, default=1e-6, help="relative tolerance [%(default)s]")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64", help="[%(default)s]")
    parser.add_argument("--max-steps", type=int, default=2000, help="most steps of a solver [%(default)s]")
    parser.add_argument("--maps", nargs="*", choices=REAL_MAPS, default=[*REAL_MAPS], help="[all]", metavar="NAME")
    options = parser.parse_args()
    print(f"| {options.dtype}, rtol {options.rtol:g} | {' | '.join(SOLVERS)} | auto / best |")
    print("|---" * (len(SOLVERS) + 2) + "|")
    for name in options.maps:
        problem = REAL_MAPS[name](getattr(torch, options.dtype))
        print(row(name, problem, options.rtol, options.max_steps), flush=True)


if __name__ == "__main__":
    main()
