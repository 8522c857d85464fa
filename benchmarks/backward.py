"""Cost and accuracy of the gradients of every backward mode, beside torchdeq's where it is installed.

python -m benchmarks.backward [--threads 2] [--repeats 7]

The forward solve is Picard's to 1e-5 relative in float32, Broyden's for SHINE, which needs its inverse. "calls" of f
are those of the forward and the backward pass, "vjps" the vector-Jacobian products. "MiB" is what autograd saves for
the backward pass, beside the arguments of f; for SHINE with the pairs in its inverse. "cosine" and "norm" compare the
gradient to all arguments of f with the exact one, computed in float64; "error" is the relative distance. Times are
medians of runs in turns. To compare exact gradients at the same accuracy, the adjoint solves of ours and of torchdeq
get the loosest tolerance, in half powers of ten, that leaves the error where the forward solve has put it. At the end:
how the saved memory grows with the steps, with Broyden(memory=3) for SHINE.
"""

import dataclasses
import functools
import importlib.util
import inspect
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

if not __package__:
    # Started by its path, it would be imported in the place of the package of the same name.
    sys.exit("Start it as a module: python -m benchmarks.backward")

# As in examples/train_imixer.py: PyTorch's threads should not wait for each other in a long busy loop.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import begin, parser
from implicit import JFB, SHINE, Checkpointed, Implicit, Phantom, Unrolled, fixed_point
from solvers import Broyden
from solvers.linear import GMRES, NeumannSeries, Richardson
from solvers.testing import BANK

RTOL, MAX_STEPS = 1e-5, 200
MODES = {
    "Unrolled": Unrolled(),
    "Checkpointed": Checkpointed(),
    "Implicit": Implicit(),
    "Implicit, Neumann 5": Implicit(linear_solver=NeumannSeries(terms=5)),
    "Phantom 5": Phantom(steps=5),
    "Phantom 1": Phantom(steps=1),
    "JFB": JFB(),
    "SHINE": SHINE(fallback=None),
    "SHINE, refined": SHINE(fallback=NeumannSeries(terms=3), max_residual=0.0),
    "SHINE, fallback": SHINE(max_residual=0.05),
}


@dataclasses.dataclass
class Problem:
    """A map with its arguments explicit, and the gradient that comes in."""

    f: Callable[..., Any]
    z0: Tensor
    args: tuple[Tensor, ...]
    w: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        args = tuple(arg.detach().to(dtype).requires_grad_() for arg in self.args)
        return Problem(self.f, self.z0.to(dtype), args, self.w.to(dtype))


def problems() -> dict[str, Problem]:
    """Problems of the bank, in float64; what their maps close over is passed as arguments."""
    closures = {
        name: inspect.getclosurevars(BANK[name](torch.float64).f).nonlocals
        for name in ("imlp", "conv", "tanh", "linear 0.9")
    }
    maps = {
        "imlp": (lambda z, y, w1, w2: y + F.linear(F.gelu(F.linear(F.gelu(z), w1)), w2), "y w1 w2"),
        "conv": (closures["conv"]["block"], "x w1 w2"),
        "tanh": (lambda z, x, w: torch.tanh(torch.addmm(x, z, w.T)), "x w"),
        "linear 0.9": (lambda z, b, a: torch.addmm(b, z, a.T), "b a"),
    }
    found = {}
    for name, (f, tensors) in maps.items():
        bank = BANK[name](torch.float64)
        w = torch.randn(bank.z0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        args = tuple(closures[name][tensor] for tensor in tensors.split())
        # An incoming gradient that has something to do with the solution, as that of a loss has.
        found[name] = Problem(f, bank.z0, args, w + bank.solution)
    return found


# Takes the map and the problem, and gives the fixed point and whatever else is known of it.
Forward = Callable[[Callable[..., Any], Problem], tuple[Tensor, Any]]


class Counter:
    """A map that counts its calls and the backward passes through them."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self._f = f
        self.calls = self.vjps = 0

    def __call__(self, z: Tensor, *args: Tensor) -> Any:
        self.calls += 1
        return _Counted.apply(self, self._f(z, *args))


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counter, output):
        ctx.counter = counter
        return output.clone()

    @staticmethod
    def backward(ctx, cotangent):
        ctx.counter.vjps += 1
        return None, cotangent


class SavedBytes:
    """Counts what autograd saves, each storage once, but for that of some tensors."""

    def __init__(self, apart: Sequence[Tensor]) -> None:
        self._apart = {tensor.untyped_storage().data_ptr() for tensor in apart}
        self._sizes: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no storage is freed, and its address used again, while it is counted
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    def add(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        self._sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def total(self) -> int:
        return sum(size for address, size in self._sizes.items() if address not in self._apart)


def saved_bytes(forward: Forward, problem: Problem) -> int:
    """What one forward pass saves for its backward pass."""
    saved = SavedBytes([problem.z0, *problem.args])
    with saved.hooks:
        _, solution = forward(problem.f, problem)
    if isinstance(getattr(solution, "backward", None), SHINE):
        inverse = solution.state.inverse
        for block in (inverse.u, inverse.v):
            saved.add(block)
    return saved.total


def ours(f, problem, *, mode, solver="picard", memory=None, rtol: float | None = RTOL, max_steps=MAX_STEPS):
    """(z, solution)."""
    atol = None if rtol is None else 0.0
    options = {"rtol": rtol, "atol": atol, "max_steps": max_steps, "on_failure": "ignore", "return_solution": True}
    solver = Broyden(memory=memory) if isinstance(mode, SHINE) else solver
    return fixed_point(f, problem.z0, *problem.args, solver=solver, backward=mode, **options)


def torchdeq(f, problem, **options):
    """(z, None) by torchdeq."""
    from torchdeq import get_deq

    deq = get_deq(f_solver="fixed_point_iter", f_tol=RTOL, f_stop_mode="rel", f_max_iter=MAX_STEPS, **options)
    (z,), _ = deq(lambda z: f(z, *problem.args), problem.z0)
    return z, None


def gradient(z: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    return torch.autograd.grad(z, problem.args, problem.w)


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def exact_gradient(problem: Problem) -> Tensor:
    z, _ = ours(problem.f, problem, mode=Implicit(linear_solver=GMRES(rtol=1e-12)), solver="anderson", rtol=1e-12)
    return flat(gradient(z, problem))


def relative_error(forward: Forward, problem: Problem, exact: Tensor) -> float:
    return float((flat(gradient(forward(problem.f, problem)[0], problem)) - exact).norm() / exact.norm())


def medians_ms(forwards: Sequence[Forward], problem: Problem, repeats: int) -> list[tuple[float, float]]:
    """Median times of the forward and the backward pass in milliseconds, in turns after a first run of each."""
    times: list[list[tuple[float, float]]] = [[] for _ in forwards]
    for repeat in range(repeats + 1):
        for forward, series in zip(forwards, times, strict=True):
            start = time.perf_counter()
            z, _ = forward(problem.f, problem)
            middle = time.perf_counter()
            gradient(z, problem)
            if repeat:
                series.append((1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)))
    return [(statistics.median(a for a, _ in series), statistics.median(b for _, b in series)) for series in times]


def loosest(forward: Callable[[float], Forward], problem: Problem, exact: Tensor) -> tuple[str, Forward]:
    """The forward pass with the loosest adjoint tolerance that does not show in the gradient's error, and its name."""
    enough = 1.1 * relative_error(
        functools.partial(ours, mode=Implicit(linear_solver=GMRES(rtol=1e-6))), problem, exact
    )
    for half_digits in range(2, 15):
        rtol = 10.0 ** (-half_digits / 2)
        run = forward(rtol)
        if relative_error(run, problem, exact) <= enough:
            break
    return f"{rtol:.0e}", run


def exact_modes(problem: Problem, exact: Tensor) -> dict[str, Forward]:
    """Gradients by the implicit function theorem at one accuracy, ours first, and torchdeq's where it is installed."""

    def own(rtol):
        return functools.partial(ours, mode=Implicit(linear_solver=Richardson(rtol=rtol)))

    def peer(rtol):
        options = {"b_solver": solver, "b_tol": rtol, "b_stop_mode": "rel", "b_max_iter": MAX_STEPS}
        return functools.partial(torchdeq, ift=True, **options)

    name, run = loosest(own, problem, exact)
    found = {f"Implicit, {name}": run}
    if importlib.util.find_spec("torchdeq"):
        for solver in ("fixed_point_iter", "anderson", "broyden"):
            name, run = loosest(peer, problem, exact)
            found[f"torchdeq, ift {solver} {name}"] = run
    return found


def phantom_modes() -> dict[str, Forward]:
    """Torchdeq's phantom gradients, where it is installed."""
    if not importlib.util.find_spec("torchdeq"):
        return {}
    return {f"torchdeq, grad={n}": functools.partial(torchdeq, grad=n) for n in (5, 1)}


def table(name: str, problem: Problem, repeats: int) -> None:
    exact = exact_gradient(problem.to(torch.float64))
    problem = problem.to(torch.float32)
    exact_ones = exact_modes(problem, exact)
    rows = {mode: functools.partial(ours, mode=MODES[mode]) for mode in MODES} | phantom_modes() | exact_ones
    times = dict(zip(rows, medians_ms(list(rows.values()), problem, repeats), strict=True))
    head = f"{'forward ms':>11} {'calls':>5} {'backward ms':>12} {'calls':>5} {'vjps':>5} {'MiB':>7}"
    print(f"{name:<36}{head} {'cosine':>8} {'norm':>7} {'error':>8}")
    for row, forward in rows.items():
        counter = Counter(problem.f)
        z, _ = forward(counter, problem)
        calls = counter.calls
        found = flat(gradient(z, problem))
        cosine, ratio = F.cosine_similarity(found, exact, dim=0), found.norm() / exact.norm()
        line = f"{row:<36}{times[row][0]:>11.2f} {calls:>5} {times[row][1]:>12.2f} {counter.calls - calls:>5}"
        line += f" {counter.vjps:>5} {saved_bytes(forward, problem) / 2**20:>7.2f}"
        print(line + f" {cosine:>8.5f} {ratio:>7.4f} {(found - exact).norm() / exact.norm():>8.1e}", flush=True)
    own, *peers = exact_ones
    pairs = [(peer, own) for peer in peers] + list(zip(phantom_modes(), ("Phantom 5", "JFB"), strict=False))
    for peer, own in pairs:
        backward, both = times[peer][1] / times[own][1], sum(times[peer]) / sum(times[own])
        print(f"  {peer}: {backward:.2f} times the backward time of {own}, {both:.2f} times that of both passes")
    print()


def growth(problem: Problem) -> None:
    """Bytes saved for backward by the number of fixed steps."""
    problem = problem.to(torch.float32)
    steps = (4, 16, 64, 256)
    print(f"{'tanh: MiB saved after':<36}" + "".join(f"{n:>5} steps" for n in steps))
    for row, mode in MODES.items():
        sizes = []
        for n in steps:
            forward = functools.partial(ours, mode=mode, memory=3, rtol=None, max_steps=n)
            sizes.append(saved_bytes(forward, problem) / 2**20)
        print(f"{row:<36}" + "".join(f"{size:>11.2f}" for size in sizes))


def main() -> None:
    """Print everything."""
    options = parser(__doc__).parse_args()
    warnings.simplefilter("ignore")
    begin(options.threads)
    print()
    for name, problem in problems().items():
        table(name, problem, options.repeats)
    growth(problems()["tanh"])


if __name__ == "__main__":
    main()
