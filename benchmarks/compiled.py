"""Whole solves with ``compile=True`` beside the same solves step by step.

python -m benchmarks.compiled [--repeats 15] [--problems NAME ...] [--solvers NAME ...] [--shapes 64x256 8192x4 ...]

One thread; the two forms of a solve alternate, and times are medians of processor time in milliseconds. "first" is how
long the first compiled solve took, in seconds: with an empty cache of Inductor's on disk it is the cold time, in a
second run of the same command the warm one. "pays after" is the number of solves whose gain makes up for it. "f" is the
time of as many bare calls of the map. With ``--shapes`` the problem is a contraction, ``r tanh(z W) + x`` with a rate
of its own for each sample, with as many samples and unknowns.

Where jaxopt is installed, its jitted Anderson acceleration solves the same problems with the same memory, to the same
tolerance and in one thread; "jaxopt / compiled" is its time over that of the compiled solve. One that did not get there
within the most calls would have taken longer, and is marked with "+".
"""

import functools
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable

if not __package__:
    sys.exit("Start it as a module: python -m benchmarks.compiled")

import torch
from torch import Tensor

from benchmarks.solvers import MAX_CALLS, RTOL, Row, geometric_mean, jaxopt
from benchmarks.timing import begin, parser
from solvers import Anderson, Broyden, Picard, Solution, Solver, solve
from solvers.testing import BANK

PROBLEMS = ["linear 0.5", "linear 0.9", "linear 0.99", "tanh", "imlp", "H-equation"]
SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "anderson 5": Anderson(),
    "anderson 10": Anderson(memory=10),
    "broyden": Broyden(),
}


def contraction(shape: str, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The map of ``--shapes`` and its start."""
    rows, unknowns = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    weight = torch.linalg.qr(torch.randn(unknowns, unknowns, generator=generator))[0].to(dtype)
    rate = 0.9 * torch.rand(rows, 1, generator=generator, dtype=dtype)
    x = torch.randn(rows, unknowns, generator=generator, dtype=dtype)
    return lambda z: rate * torch.tanh(z @ weight) + x, torch.zeros_like(x)


def run(f: Callable[[Tensor], Tensor], z0: Tensor, solver: Solver, *, compile: bool) -> Solution[Tensor]:
    return solve(f, z0, solver, rtol=RTOL, atol=0, max_steps=MAX_CALLS, compile=compile, on_failure="ignore")


def processor_ms(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """Medians of processor time, taken in turns after a first call of each."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for call, series in zip(runs, times, strict=True):
            start = time.process_time()
            call()
            if repeat:
                series.append(1e3 * (time.process_time() - start))
    return [statistics.median(series) for series in times]


def row(
    name: str, f: Callable[[Tensor], Tensor], z0: Tensor, solver: str, repeats: int, theirs: Row | None
) -> tuple[str, float]:
    """One line of the table, and jaxopt's time, ``theirs``, over that of the compiled solve."""
    forms = [functools.partial(run, f, z0, SOLVERS[solver], compile=compile) for compile in (False, True)]
    start = time.perf_counter()
    compiled = forms[1]()
    first = time.perf_counter() - start
    eager = forms[0]()
    eager_ms, compiled_ms, f_ms = processor_ms([*forms, functools.partial(f, z0)], repeats)
    gain = eager_ms - compiled_ms
    pays = math.ceil(1e3 * first / gain) if gain > 0 else math.inf
    cells = [
        *(name, solver, eager.num_evals, compiled.num_evals),
        "yes" if torch.equal(eager.status, compiled.status) else "no",
        *(f"{number:.2f}" for number in (eager_ms, compiled_ms, f_ms * eager.num_evals, eager_ms / compiled_ms)),
        *(f"{first:.1f}", pays),
    ]
    ratio = math.nan
    if theirs is not None:
        ratio, more = theirs.processor_ms / compiled_ms, "" if theirs.converged else "+"
        cells += [theirs.calls, f"{theirs.processor_ms:.2f}{more}", f"{ratio:.2f}{more}"]
    return f"| {' | '.join(map(str, cells))} |", ratio


def main() -> None:
    """Print the table."""
    options = parser(__doc__, threads=1, repeats=15)
    options.add_argument("--problems", nargs="*", choices=PROBLEMS, default=PROBLEMS, metavar="NAME", help="[all]")
    options.add_argument("--solvers", nargs="*", choices=SOLVERS, default=[*SOLVERS], metavar="NAME", help="[all]")
    options.add_argument("--shapes", nargs="*", default=[], metavar="64x256", help="shapes, instead of the problems")
    options.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="[%(default)s]")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    begin(given.threads)
    columns = ["problem", "solver", "calls", "compiled", "statuses equal", "ms", "compiled", "f", "ratio"]
    columns += ["first, s", "pays after"]
    dtype = getattr(torch, given.dtype)
    bank = {name: BANK[name](dtype) for name in ([] if given.shapes else given.problems)}
    maps = {name: (problem.f, problem.z0) for name, problem in bank.items()}
    maps |= {shape: contraction(shape, dtype) for shape in given.shapes}
    from_jax: dict[str, Row] = {}
    if bank and dtype == torch.float32 and any(solver.startswith("anderson") for solver in given.solvers):
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
        from_jax = jaxopt(bank, given.repeats)
    if from_jax:
        columns += ["jaxopt's calls", "ms", "jaxopt / compiled"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    ratios = []
    with torch.no_grad():
        for name, (f, z0) in maps.items():
            for solver in given.solvers:
                theirs = from_jax.get(f"{name}/{solver.split()[-1]}")
                line, ratio = row(name, f, z0, solver, given.repeats, theirs)
                ratios += [ratio] if theirs else []
                print(line, flush=True)
    if ratios:
        print(f"\ngeometric mean of jaxopt / compiled: {geometric_mean(ratios):.2f}")


if __name__ == "__main__":
    main()
