"""Calls of the map and time of each solver on the problem bank, beside torchdeq where it is installed.

python -m benchmarks.solvers [--threads 2] [--repeats 7]

Every row solves the same problem from the same start to 1e-5 relative in float32, with at most 200 calls of f; the
worst sample's residual is computed afterwards, in the same way for all. Time is the median of the repeats; "/ f" is its
ratio to that of as many bare calls of f, "ours" how many times faster ours is.
"""

import argparse
import functools
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable

if not __package__:
    # Started by its path, it would be imported in the place of the package of the same name.
    sys.exit("Start it as a module: python -m benchmarks.solvers")

# As in examples/train_imixer.py: PyTorch's threads should not wait for each other in a long busy loop.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor

from solvers import Anderson, Broyden, Picard, solve
from solvers.testing import BANK, BankProblem

PROBLEMS = ["linear 0.5", "linear 0.9", "linear 0.99", "tanh", "imlp", "H-equation"]
RTOL, MAX_CALLS = 1e-5, 200
Result = tuple[Tensor, int]


def ours(problem: BankProblem) -> dict[str, Callable[[], Result]]:
    """Our solvers by name."""
    solvers = {
        "picard": Picard(),
        "anderson 5": Anderson(),
        "anderson 10": Anderson(memory=10),
        "broyden": Broyden(),
    }

    def run(solver):
        solution = solve(problem.f, problem.z0, solver, rtol=RTOL, atol=0, max_steps=MAX_CALLS, on_failure="ignore")
        return solution.value, solution.num_evals

    return {name: functools.partial(run, solver) for name, solver in solvers.items()}


def torchdeq(problem: BankProblem) -> dict[str, Callable[[], Result]]:
    """Torchdeq's solvers by the names of ours; empty when it is not installed."""
    try:
        from torchdeq.solver import get_solver
    except ImportError:
        return {}

    def run(name, **options):
        calls = 0

        def f(z):
            nonlocal calls
            calls += 1
            return problem.f(z)

        with torch.no_grad():
            value, _, _ = get_solver(name)(f, problem.z0, max_iter=MAX_CALLS, tol=RTOL, stop_mode="rel", **options)
        return value, calls

    return {
        "picard": lambda: run("fixed_point_iter"),
        "anderson 5": lambda: run("anderson", m=5),
        "anderson 10": lambda: run("anderson", m=10),
        "broyden": lambda: run("broyden"),
    }


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Median time of one call after one to warm up, in milliseconds."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def describe(problem: BankProblem, run: Callable[[], Result], repeats: int) -> tuple[int, float, float]:
    """Calls of f, milliseconds, and the worst sample's relative residual."""
    value, calls = run()
    image = problem.f(value)
    residual = ((image - value).norm(dim=1) / image.norm(dim=1)).max().item()
    return calls, median_ms(run, repeats), residual


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch [%(default)s]")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the median is taken [%(default)s]")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{platform.machine()}, {options.threads} threads, {versions}")
    print(
        f"{'problem':<12} {'solver':<12} {'calls':>5} {'ms':>8} {'/ f':>6} {'residual':>9}"
        f"   {'torchdeq':>8} {'ms':>8} {'residual':>9} {'ours':>7}"
    )
    for name in PROBLEMS:
        problem = BANK[name](torch.float32)
        f_ms = median_ms(functools.partial(problem.f, problem.z0), options.repeats)
        theirs = torchdeq(problem)
        for solver, run in ours(problem).items():
            calls, ms, residual = describe(problem, run, options.repeats)
            line = f"{name:<12} {solver:<12} {calls:>5} {ms:>8.2f} {ms / (calls * f_ms):>6.2f} {residual:>9.1e}"
            if solver in theirs:
                their_calls, their_ms, their_residual = describe(problem, theirs[solver], options.repeats)
                line += f"   {their_calls:>8} {their_ms:>8.2f} {their_residual:>9.1e} {their_ms / ms:>7.2f}x"
            print(line, flush=True)


if __name__ == "__main__":
    main()
