"""Which solver solves which of 23 classical systems of equations, beside the methods of scipy.optimize.root.

python -m benchmarks.nonlinear [--starts 1 10 100] [--max-steps 300] [--problems NAME ...] [--roots]

A system F(x) = 0 is given to our solvers as the maps z - F(z) and z + F(z), in float64, with the relative tolerance
1e-10; to SciPy's as F itself with tol=1e-10 and its own limits. Every solver starts from the usual start times each of
the factors. What it returns counts as solved if |F(x)| is at most 1e-8 times the larger of 1 and the size of the usual
start, whatever the solver says of it. A solver that says it has converged where this is not so has told a falsehood,
which an exclamation mark shows. The tables are Markdown: calls of F where the system was solved, and a dash where it
was not; for our solvers with both signs. With --roots, our solvers are given F itself by implicit.root, and the table
says how many systems each solved, of how many it said so, and how many of these are no roots: neither is |F| small, nor
is Newton's step at the value within ten times the tolerance.
"""

import argparse
import dataclasses
import platform
import warnings
from collections.abc import Callable

import numpy as np
import scipy
import torch
from scipy.optimize import root

from implicit import root as implicit_root
from solvers import Anderson, Auto, Broyden, Newton, NewtonKrylov, Picard, Solver, solve
from solvers.testing import NONLINEAR, NonlinearProblem

RTOL = 1e-10
SOLVED = 1e-8
OURS: dict[str, Solver] = {
    "Picard": Picard(),
    "Anderson": Anderson(memory=10),
    "Broyden": Broyden(),
    "Broyden, line search": Broyden(line_search=True),
    "NewtonKrylov": NewtonKrylov(),
    "Auto": Auto(),
}
SCIPY = ["hybr", "lm", "broyden1", "broyden2", "anderson", "krylov", "df-sane"]


@dataclasses.dataclass(frozen=True)
class Run:
    """How a solver fared: calls of F, whether it solved the system, and whether it said so."""

    calls: int
    solved: bool
    claimed: bool

    @property
    def false(self) -> bool:
        """Whether it claimed to have solved what it had not."""
        return self.claimed and not self.solved

    def __str__(self) -> str:
        return str(self.calls) if self.solved else "!" if self.false else "-"


def is_solved(problem: NonlinearProblem, value: torch.Tensor) -> bool:
    """Whether F is near zero at ``value`` (1, D), in units of the usual start."""
    bound = SOLVED * max(1.0, float(problem.x0.norm()))
    return bool(problem.F(value).norm() <= bound)


def run_ours(problem: NonlinearProblem, factor: float, solver: Solver, sign: str, max_steps: int) -> Run:
    """One of our solvers on z - F(z) or z + F(z)."""
    f = problem.minus if sign == "-" else problem.plus
    z0 = factor * problem.x0
    solution = solve(f, z0, solver, rtol=RTOL, atol=0, max_steps=max_steps, on_failure="ignore")
    return Run(solution.num_evals, is_solved(problem, solution.value), bool(solution.converged))


def run_scipy(problem: NonlinearProblem, factor: float, method: str) -> Run:
    """One of SciPy's methods on F."""
    calls = 0

    def function(x: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return problem.F(torch.from_numpy(np.asarray(x, dtype=np.float64)).view(1, -1))[0].numpy()

    try:
        with np.errstate(all="ignore"):
            found = root(function, factor * problem.x0[0].numpy(), method=method, tol=RTOL)
    except (ArithmeticError, ValueError, np.linalg.LinAlgError):
        # A value that is not finite.
        return Run(calls, False, False)
    value = torch.from_numpy(np.asarray(found.x, dtype=np.float64)).view(1, -1)
    return Run(calls, is_solved(problem, value), bool(found.success))


def all_runs(problem: NonlinearProblem, factor: float, max_steps: int) -> dict[str, list[Run]]:
    """The runs of every solver by name: two of each of ours, one of each of SciPy's."""
    runs = {
        name: [run_ours(problem, factor, solver, sign, max_steps) for sign in "-+"] for name, solver in OURS.items()
    }
    return {**runs, **{f"scipy {method}": [run_scipy(problem, factor, method)] for method in SCIPY}}


def run_root(problem: NonlinearProblem, factor: float, solver: Solver, max_steps: int) -> Run:
    """One of our solvers on F."""
    value, solution = implicit_root(
        problem.F,
        factor * problem.x0,
        solver=solver,
        rtol=RTOL,
        max_steps=max_steps,
        on_failure="ignore",
        return_solution=True,
    )
    solved = is_solved(problem, value)
    if bool(solution.converged) and not solved:
        jacobian = torch.func.jacrev(lambda x: problem.F(x.unsqueeze(0)).squeeze(0))(value[0])
        step = torch.linalg.pinv(jacobian) @ problem.F(value)[0]
        solved = bool(step.norm() <= 10 * RTOL * value.norm())
    return Run(solution.num_evals, solved, bool(solution.converged))


def print_roots(problems: dict[str, NonlinearProblem], starts: list[float], max_steps: int) -> None:
    """Solved, said to be solved, and falsely so, by solver and start."""
    print("\nRoots: solved / said to be solved / falsely so\n")
    print_row(["solver", *(f"from {factor:g} x0" for factor in starts)])
    print_row(["---"] * (len(starts) + 1))
    for name, solver in {"Newton": Newton(), **OURS}.items():
        cells: list[object] = [name]
        for factor in starts:
            runs = [run_root(problem, factor, solver, max_steps) for problem in problems.values()]
            counts = (sum(r.solved for r in runs), sum(r.claimed for r in runs), sum(r.false for r in runs))
            cells.append(" / ".join(map(str, counts)))
        print_row(cells)


def print_row(cells: list[object]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_table(problems: dict[str, NonlinearProblem], factor: float, max_steps: int) -> None:
    """The table of one start, and below it how many systems each solver solved."""
    names = [*OURS, *(f"scipy {method}" for method in SCIPY)]
    print(f"\nFrom {factor:g} times the usual start:\n")
    print_row(["problem", *names])
    print_row(["---"] * (len(names) + 1))
    table = {}
    for title, problem in problems.items():
        table[title] = all_runs(problem, factor, max_steps)
        print_row([title, *(" / ".join(map(str, table[title][name])) for name in names)])

    def total(count: Callable[[Run], int]) -> list[str]:
        """By solver, the sums over the problems for each sign."""
        columns = [zip(*(runs[name] for runs in table.values()), strict=True) for name in names]
        return [" / ".join(str(sum(map(count, sign))) for sign in column) for column in columns]

    print_row(["**solved**", *total(lambda run: run.solved)])
    print_row(
        ["with the better sign", *(sum(any(r.solved for r in runs[n]) for runs in table.values()) for n in names)]
    )
    print_row(["falsehoods", *total(lambda run: run.false)])
    print_row(["all calls", *total(lambda run: run.calls)])


def main() -> None:
    """Print a table for each start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=float, nargs="+", default=[1, 10, 100], help="factors [1 10 100]")
    parser.add_argument("--max-steps", type=int, default=300, help="most steps of our solvers [%(default)s]")
    parser.add_argument(
        "--problems", nargs="+", choices=[*NONLINEAR], default=[*NONLINEAR], metavar="NAME", help="[all]"
    )
    parser.add_argument("--roots", action="store_true", help="give F itself to our solvers, by implicit.root")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, scipy {scipy.__version__}"
    print(f"{platform.machine()}, {versions}")
    if options.roots:
        print_roots({name: NONLINEAR[name] for name in options.problems}, options.starts, options.max_steps)
        return
    for factor in options.starts:
        print_table({name: NONLINEAR[name] for name in options.problems}, factor, options.max_steps)


if __name__ == "__main__":
    main()
