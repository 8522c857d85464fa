"""Whole solves on the device: with ``compile=True`` beside step by step, and a million roots beside a loop by hand.

In toy sizes nothing is compiled, for that takes long.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.compiled_gradients import Map
from benchmarks.kepler import RTOL, by_hand, kepler
from benchmarks.on_gpu.cells import Cell, WrongResultError
from benchmarks.on_gpu.correctness import moved
from benchmarks.on_gpu.setup import Setup
from benchmarks.on_gpu.timing import median_seconds
from implicit import FixedPointLayer, root
from solvers import Anderson, Broyden, Picard, Solver, solve
from solvers.testing import BANK

SOLVERS: dict[str, Solver] = {"picard": Picard(), "anderson 5": Anderson(), "broyden": Broyden()}
PROBLEMS = ("linear 0.9", "tanh", "imlp")
RATES = (0.5, 0.9)


def compiled(problem: str, solver: str, setup: Setup) -> Mapping[str, float]:
    """Milliseconds of a solve to 1e-5 in float32, in both forms, and seconds of the first compiled one."""
    there = moved(BANK[problem](torch.float32), setup.device)
    options: dict[str, Any] = {"rtol": 1e-5, "atol": 0, "max_steps": 200, "on_failure": "ignore"}

    def run(compile: bool) -> int:
        with torch.no_grad():
            return solve(there.f, there.z0, SOLVERS[solver], compile=compile, **options).num_evals

    if setup.toy:
        return {"calls": run(False), "ms": 1e3 * median_seconds(functools.partial(run, False), setup)}
    start = time.perf_counter()
    calls = run(True)
    first = time.perf_counter() - start
    eager, fast = (1e3 * median_seconds(functools.partial(run, compile), setup) for compile in (False, True))
    values = {"calls": run(False), "compiled calls": calls, "ms": eager, "compiled ms": fast}
    return {**values, "compiled faster": eager / fast, "first, s": first}


def roots(samples: int, setup: Setup) -> Mapping[str, float]:
    """Milliseconds of Kepler's equation in float64: by hand, by root, and its gradient."""
    generator = torch.Generator().manual_seed(0)
    mean, eccentricity = torch.rand(2, samples, dtype=torch.float64, generator=generator).to(setup.device)
    mean, eccentricity = 2 * torch.pi * mean, 0.9 * eccentricity
    start = mean + eccentricity * torch.sin(mean)
    leaf = eccentricity.clone().requires_grad_()
    value = root(kepler, start, leaf, mean, rtol=RTOL)
    error = float((value.detach() - by_hand(start, eccentricity, mean)).abs().max())
    if not error < 1e-6:
        raise WrongResultError(f"root is {error:.1e} away from the loop by hand")
    rows: dict[str, Callable[[], object]] = {
        "by hand": lambda: by_hand(start, eccentricity, mean),
        "root": lambda: root(kepler, start, eccentricity, mean, rtol=RTOL),
        "backward": lambda: torch.autograd.grad(value.sum(), leaf, retain_graph=True),
    }
    if not setup.toy:
        rows["compiled root"] = lambda: root(kepler, start, eccentricity, mean, rtol=RTOL, compile=True)
    values = {f"{name}, ms": 1e3 * median_seconds(run, setup) for name, run in rows.items()}
    return {**values, "root over by hand": values["root, ms"] / values["by hand, ms"]}


def gradients(rate: float, setup: Setup) -> Mapping[str, float]:
    """Milliseconds of a layer's solve and backward pass, 64 x 256 in float32 by Anderson(5), in both forms."""
    torch.manual_seed(0)
    samples, unknowns = (2, 4) if setup.toy else (64, 256)
    f, x = Map(unknowns, rate).to(setup.device), torch.randn(samples, unknowns, device=setup.device)
    values: dict[str, float] = {}
    found = []
    for name, compile in (("", False),) if setup.toy else (("", False), ("compiled ", True)):
        layer = FixedPointLayer(f, solver="anderson", rtol=1e-5, compile=compile)

        def run(layer: FixedPointLayer = layer) -> list[Tensor]:
            return list(torch.autograd.grad(layer(x).sum(), list(f.parameters())))

        found.append(torch.cat([gradient.flatten() for gradient in run()]))
        values[f"{name}ms"] = 1e3 * median_seconds(run, setup)
    error = float((found[-1] - found[0]).norm() / found[0].norm())
    if not error < 1e-3:
        raise WrongResultError(f"the compiled gradient is {error:.1e} away")
    if not setup.toy:
        values |= {"compiled faster": values["ms"] / values["compiled ms"], "apart": error}
    return values


def cells(setup: Setup) -> list[Cell]:
    solves = [
        Cell(
            section="compiled",
            table="Solves to 1e-5 in float32, step by step and with compile=True",
            labels={"problem": problem, "solver": solver},
            run=functools.partial(compiled, problem, solver, setup),
            rank=5,
            seconds=11.0,
        )
        for problem in setup.some(PROBLEMS)
        for solver in SOLVERS
    ]
    samples = (1000,) if setup.toy else (10_000, 1_000_000)
    found = [
        Cell(
            section="roots",
            table="Kepler's equation in float64",
            labels={"samples": count},
            run=functools.partial(roots, count, setup),
            rank=3,
        )
        for count in samples
    ]
    layers = [
        Cell(
            section="compiled",
            table="A layer's solve and gradient in float32, step by step and with compile=True",
            labels={"state": "64 x 256", "rate": rate},
            run=functools.partial(gradients, rate, setup),
            rank=5,
            seconds=25.0,
        )
        for rate in RATES
    ]
    return solves + layers + found
