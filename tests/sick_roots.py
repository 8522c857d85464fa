"""Equations that are sick of one known thing each, and healthy ones, for the tests of the diagnosis of roots."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from implicit import root
from implicit.diagnostics import Cause

Equations = Callable[[Tensor, Tensor], Tensor]


class Solved(nn.Module):
    """A model whose forward pass finds a root, in units of the unknowns."""

    def __init__(self, equations: Equations, start: tuple[float, ...], unit: float, options: dict[str, Any]) -> None:
        super().__init__()
        self.equations, self.start, self.unit, self.options = equations, start, unit, options

    def forward(self, x: Tensor) -> Tensor:
        z0 = self.unit * torch.tensor(self.start).to(x).expand(len(x), -1)

        def equations(z: Tensor, x: Tensor) -> Tensor:
            return self.equations(z / self.unit, x)

        found: Tensor = root(equations, z0, x, **self.options)
        return found


@dataclasses.dataclass(frozen=True)
class Problem:
    """Equations, a start and the options of the solve; inputs are drawn between 0 and 1."""

    equations: Equations
    start: tuple[float, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    curable: bool = True

    def make(self, dtype: torch.dtype, batch: int, unit: float, seed: int) -> tuple[Solved, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(batch, 1, generator=generator, dtype=torch.float64).to(dtype)
        return Solved(self.equations, self.start, unit, self.options), x


def _pair(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack((first, second), dim=1)


def freudenstein_roth(z: Tensor, x: Tensor) -> Tensor:
    """A root at (5, 4), and a minimum of 48.98 of the sum of squares at (11.41, -0.90)."""
    a, b = z.unbind(1)
    return _pair(a - 13 + ((5 - b) * b - 2) * b, a - 29 + ((b + 1) * b - 14) * b)


def rosenbrock(z: Tensor, x: Tensor) -> Tensor:
    a, b = z.unbind(1)
    return _pair(10 * (b - a**2), 1 - a)


def cubic(z: Tensor, x: Tensor) -> Tensor:
    return z**3 - 1 - x


def logarithm(z: Tensor, x: Tensor) -> Tensor:
    return z.log() + 3 + x


def circles(z: Tensor, x: Tensor) -> Tensor:
    """A curve and a line that touch at (1, 2), and meet in no other point."""
    a, b = z.unbind(1)
    return _pair((a - 1) ** 2 + b - 2, b - 2)


def saddle(z: Tensor, x: Tensor) -> Tensor:
    """Steps along F reduce one of the equations and not the other."""
    a, b = z.unbind(1)
    return _pair(a - x[:, 0] + 0.1 * b**2, 1 - 2 * b - x[:, 0])


# Name -> the cause and the problem.
SICK: dict[str, tuple[Cause, Problem]] = {
    "square plus one": (Cause.NO_ROOT, Problem(lambda z, x: z**2 + 1 + x, (1.0, 2.0), curable=False)),
    "parallel lines": (
        Cause.NO_ROOT,
        Problem(lambda z, x: _pair(z.sum(1) - 1, z.sum(1) - 2 - x[:, 0]), (0.3, 0.3), curable=False),
    ),
    "decay": (Cause.NO_ROOT, Problem(lambda z, x: torch.exp(-z) * (1 + x), (1.0,), curable=False)),
    "valley": (Cause.LOCAL_MINIMUM, Problem(freudenstein_roth, (0.5, -2.0))),
    "double root": (Cause.SINGULAR_JACOBIAN, Problem(lambda z, x: (z - 1) ** 2 * (1 + x), (3.0,), {"max_steps": 9})),
    "double root, found": (Cause.SINGULAR_JACOBIAN, Problem(lambda z, x: (z - 1) ** 2, (3.0,), curable=False)),
    "touching curves": (Cause.SINGULAR_JACOBIAN, Problem(circles, (3.0, 3.0), curable=False)),
    "dependent equations": (
        Cause.SINGULAR_JACOBIAN,
        Problem(lambda z, x: _pair(z.sum(1) - x[:, 0], 2 * z.sum(1) - 2 * x[:, 0]), (0.3, 0.1), curable=False),
    ),
    "far": (Cause.START_TOO_FAR, Problem(cubic, (1e6, 1e6), {"max_steps": 15})),
    "few steps": (Cause.TOO_FEW_STEPS, Problem(cubic, (2.5, 2.5), {"max_steps": 3, "rtol": 1e-6})),
    "logarithm": (Cause.DOMAIN_LEFT, Problem(logarithm, (2.0,), {"solver": "broyden"})),
    "logarithm by Anderson": (Cause.DOMAIN_LEFT, Problem(logarithm, (2.0, 1.0), {"solver": "anderson"})),
    "square root": (Cause.NOT_FINITE, Problem(lambda z, x: z.sqrt() - x - 1, (-1.0,))),
    "tight": (Cause.TOLERANCE_TOO_TIGHT, Problem(cubic, (1.0, 2.0), {"rtol": 1e-18})),
    "cancellation": (
        Cause.PRECISION_FLOOR,
        Problem(
            lambda z, x: (z + z.exp() + 1e-3 / torch.finfo(z.dtype).eps) - 1e-3 / torch.finfo(z.dtype).eps - 9 - x,
            (1.5, 1.0),
            {"rtol": 1e-6},
        ),
    ),
    "loose": (
        Cause.TOLERANCE_TOO_LOOSE,
        Problem(
            lambda z, x: z * torch.linspace(0.1, 1, 40).to(z) - 1 - x,
            (0.0,) * 40,
            {"solver": "picard", "rtol": 0.1, "max_steps": 500},
        ),
    ),
    "coupled": (Cause.SAMPLES_MIX, Problem(lambda z, x: z**3 - 1 - x.mean() + 0.3 * z.flip(0), (1.0, 1.0))),
    "random": (Cause.MAP_CHANGES, Problem(lambda z, x: z * (1 + torch.rand_like(z)) - 1, (1.0, 1.0), curable=False)),
    "saddle": (Cause.UNSUITED_SOLVER, Problem(saddle, (2.0, 3.0), {"solver": "picard"})),
}

HEALTHY: dict[str, Problem] = {
    "cubic": Problem(cubic, (1.0, 3.0)),
    "root at zero": Problem(lambda z, x: z + z**3, (1.0,)),
    "steep": Problem(lambda z, x: torch.exp(100 * (z - 1)) - 1 - x, (1.1,)),
    "valley from the other side": Problem(freudenstein_roth, (4.5, 4.5)),
    "Rosenbrock": Problem(rosenbrock, (-1.2, 1.0)),
    "odd units of the equations": Problem(
        lambda z, x: _pair(z[:, 0] - 1 + 1e6 * (z[:, 1] - 2), 1e-6 * (z[:, 0] - 1) - 3 * (z[:, 1] - 2)), (0.1, 0.1)
    ),
    "logarithm by Newton": Problem(logarithm, (2.0,)),
    "saddle by Newton": Problem(saddle, (2.0, 3.0)),
    "sine by Anderson": Problem(lambda z, x: z + 0.3 * z.sin() - x, (0.1,), {"solver": "anderson"}),
    "two hundred unknowns": Problem(
        lambda z, x: z + 0.2 * z**3 + 0.1 * z.roll(1, 1) - 1 - x, (0.5,) * 200, {"solver": "newton_krylov"}
    ),
    "double root, not reached": Problem(lambda z, x: (z - 1) ** 2 - 0.25, (3.0,)),
    "far, with the steps it takes": Problem(cubic, (1e6, 1e6), {"max_steps": 100}),
}
