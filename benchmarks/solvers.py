"""Calls of the map and time of each solver on the problem bank, beside torchdeq and jaxopt where they are installed.

python -m benchmarks.solvers [--threads 2] [--repeats 7]

Every row solves the same problem from the same start to 1e-5 relative in float32, with at most 200 calls of f; the
worst sample's residual is computed afterwards, in the same way for all, and a method that has not converged counts as
infinitely slow. Time is the median of the repeats; those of ours and of torchdeq alternate. "/ f" is the ratio to as
many bare calls of f, "ours" how many times faster ours is. jaxopt's Anderson acceleration is one compiled loop over the
batch, run in a process of its own. Below the table: geometric means, and what ``compact=True`` saves.
"""

import dataclasses
import functools
import inspect
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

if not __package__:
    # Started by its path, it would be imported in the place of the package of the same name.
    sys.exit("Start it as a module: python -m benchmarks.solvers")

# As in examples/train_imixer.py: PyTorch's threads should not wait for each other in a long busy loop.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import begin, medians_ms, parser
from solvers import Anderson, Auto, Broyden, Picard, solve
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
        "auto": Auto(),
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


@dataclasses.dataclass
class Row:
    """Calls of f, the median time in milliseconds, the worst sample's relative residual, and the processor's time."""

    calls: int
    ms: float
    residual: float
    processor_ms: float = math.nan

    @property
    def converged(self) -> bool:
        """Whether it met the tolerance, but for the last iterate being one step further."""
        return self.residual <= 1.5 * RTOL


def measure(problem: BankProblem, runs: list[Callable[[], Result]], repeats: int) -> list[Row]:
    """One row for each of several ways to solve the problem, run in turns."""
    rows = []
    for run in runs:
        value, calls = run()
        image = problem.f(value)
        rows.append(Row(calls, math.nan, ((image - value).norm(dim=1) / image.norm(dim=1)).max().item()))
    for row, ms in zip(rows, medians_ms(runs, repeats), strict=True):
        row.ms = ms
    return rows


def jaxopt(problems: dict[str, BankProblem], repeats: int) -> dict[str, Row]:
    """Rows of jaxopt's Anderson acceleration by "problem/memory"; empty when it is not installed."""
    arrays = {}
    for name, problem in problems.items():
        arrays[f"{name}/z0"] = problem.z0.numpy()
        for tensor, value in inspect.getclosurevars(problem.f).nonlocals.items():
            arrays[f"{name}/{tensor}"] = value.numpy()
    options = {"problems": [*problems], "memories": [5, 10], "rtol": RTOL, "max_calls": MAX_CALLS, "repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "problems.npz")
        np.savez(file, allow_pickle=False, options=json.dumps(options), **arrays)
        script = Path(__file__).with_name("jaxopt_anderson.py")
        done = subprocess.run([sys.executable, script, file], capture_output=True, text=True)
    if done.returncode:
        print(f"no jaxopt: {done.stderr.strip().splitlines()[-1]}")
        return {}
    return {name: Row(**row) for name, row in json.loads(done.stdout).items()}


def geometric_mean(ratios: Iterable[float]) -> float:
    """The geometric mean of some ratios; nan of none."""
    logs = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def table(problems: dict[str, BankProblem], repeats: int) -> None:
    """The table, and the geometric means below it."""
    from_jax = jaxopt(problems, repeats)
    peers = [f"   {name:>8} {'ms':>8} {'residual':>9} {'ours':>6}" for name in ("torchdeq", "jaxopt")]
    print(f"{'problem':<12} {'solver':<12} {'calls':>5} {'ms':>8} {'/ f':>6} {'residual':>9}" + "".join(peers))
    ratios: dict[str, list[float]] = {}
    for name, problem in problems.items():
        (f_ms,) = medians_ms([functools.partial(problem.f, problem.z0)], 20 * repeats)
        theirs = torchdeq(problem)
        best: dict[str, list[float]] = {"ours": [], "torchdeq": [], "jaxopt": []}
        for solver, run in ours(problem).items():
            row, *others = measure(problem, [run, *([theirs[solver]] if solver in theirs else [])], repeats)
            line = f"{name:<12} {solver:<12} {row.calls:>5} {row.ms:>8.2f} {row.ms / (row.calls * f_ms):>6.2f}"
            line += f" {row.residual:>9.1e}"
            if row.converged:
                best["ours"].append(row.ms)
            memory = solver.split()[-1]
            for peer, other in (("torchdeq", next(iter(others), None)), ("jaxopt", from_jax.get(f"{name}/{memory}"))):
                if other is None:
                    line += " " * 37
                    continue
                ratio = other.ms / row.ms
                line += f"   {other.calls:>8} {other.ms:>8.2f} {other.residual:>9.1e} {ratio:>5.2f}x"
                if other.converged:
                    best[peer].append(other.ms)
                # A peer that has not converged would have taken longer than it did.
                if row.converged or not other.converged:
                    ratios.setdefault(f"{solver}, {peer}'s time over ours", []).append(ratio)
            print(line.rstrip(), flush=True)
        for peer in ("torchdeq", "jaxopt"):
            if best["ours"] and best[peer]:
                key = f"the best of {peer} over the best of ours"
                ratios.setdefault(key, []).append(min(best[peer]) / min(best["ours"]))
    print()
    for name, values in sorted(ratios.items()):
        print(f"{name}: geometric mean {geometric_mean(values):.2f} over {len(values)} rows, least {min(values):.2f}")
    same_name = [value for name, values in ratios.items() if ", torchdeq" in name for value in values]
    print(f"all same-named, torchdeq's time over ours: geometric mean {geometric_mean(same_name):.2f}")


def compaction(repeats: int) -> None:
    """What leaves the call of f need not be computed: easy and hard samples in one batch, with an expensive f."""
    problem = BANK["mixed"](torch.float32)
    tensors = inspect.getclosurevars(problem.f).nonlocals
    a, b, c = tensors["a"], tensors["b"], tensors["c"]
    dear = torch.eye(a.shape[0]).repeat(1, 60)  # (D, 60 D), whose only purpose is to take time

    def f(z, b, c):
        return c * (((z @ dear) @ dear.T / 60) @ a.T) + b

    def run(compact):
        options = {"args": (b, c), "rtol": RTOL, "atol": 0, "max_steps": 1000, "compact": compact}
        return solve(f, problem.z0, Picard(), **options)

    plain, compact = medians_ms([functools.partial(run, False), functools.partial(run, True)], repeats)
    difference = (run(False).value - run(True).value).abs().max().item()
    print(
        f"mixed, picard with an expensive f: {plain:.1f} ms, with compact=True {compact:.1f} ms, "
        f"{plain / compact:.2f} times faster; the answers differ by at most {difference:.1e}"
    )


def main() -> None:
    """Print everything."""
    options = parser(__doc__).parse_args()
    warnings.simplefilter("ignore")
    begin(options.threads)
    table({name: BANK[name](torch.float32) for name in PROBLEMS}, options.repeats)
    compaction(options.repeats)


if __name__ == "__main__":
    main()
