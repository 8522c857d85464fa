"""Fixed-point problems that are sick of one known thing each, and healthy ones, for the tests of the diagnosis."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from implicit import FixedPointLayer, InvertibleResidual, spectral_norm
from implicit.diagnostics import Cause
from solvers import NewtonKrylov, Picard, Steps


@dataclasses.dataclass(frozen=True)
class Patient:
    """A model, its inputs and what is wrong with it."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    curable: bool = True


# Makes a patient from the dtype, the number of samples, the unit of the state and a seeded source of numbers.
Make = Callable[[torch.dtype, int, float, torch.Generator], Patient]


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _layer(f: Callable[..., Tensor], unit: float, start: float | None = None, **options: Any) -> nn.Module:
    """The map in other units: f of the state and the inputs divided by ``unit``."""

    def scaled(z: Tensor, x: Tensor) -> Tensor:
        return unit * f(z / unit, x / unit)

    init = None if start is None else (lambda x: torch.full_like(x, start * unit))
    return FixedPointLayer(scaled, init=init, on_failure="ignore", **options)


def _made(f: Callable[..., Tensor], *, size: int = 6, curable: bool = True, **options: Any) -> Make:
    def make(dtype: torch.dtype, batch: int, unit: float, generator: torch.Generator) -> Patient:
        x = unit * _normal(generator, dtype, batch, size)
        return Patient(_layer(f, unit, **options), (x,), curable)

    return make


def _linear(matrix: Callable[[], Tensor], **options: Any) -> Make:
    a = matrix()
    return _made(lambda z, x: z @ a.to(z).T + x, size=len(a), **options)


def _basis(size: int) -> Tensor:
    q: Tensor = torch.linalg.qr(_normal(torch.Generator().manual_seed(5), torch.float64, size, size))[0]
    return q


def _with_eigenvalues(*values: float) -> Tensor:
    q = _basis(len(values))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def _rotation(radius: float, angle: float) -> Tensor:
    c, s = radius * math.cos(angle), radius * math.sin(angle)
    a = torch.block_diag(torch.tensor([[c, -s], [s, c]], dtype=torch.float64), 0.3 * torch.eye(4, dtype=torch.float64))
    turned: Tensor = _basis(6) @ a @ _basis(6).T
    return turned


def _rotations(radius: float) -> Tensor:
    """Six dimensions turned in three planes, so that rounding keeps every entry in motion."""
    blocks = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in (0.7, 1.2, 2.0)]
    turned: Tensor = _basis(6) @ torch.block_diag(*blocks).double() @ _basis(6).T
    return radius * turned


def _non_normal() -> Tensor:
    return 0.6 * torch.eye(8, dtype=torch.float64) + torch.diag(torch.full((7,), 3.0, dtype=torch.float64), 1)


class Module(nn.Module):
    """A map with a module inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.inner(z)) + x


def _with_module(inner: Callable[[], nn.Module]) -> Make:
    def make(dtype: torch.dtype, batch: int, unit: float, generator: torch.Generator) -> Patient:
        f = Module(inner()).to(dtype).train()
        layer = FixedPointLayer(lambda z, x: unit * f(z / unit, x / unit), on_failure="ignore")
        return Patient(layer, (unit * _normal(generator, dtype, max(batch, 2), 6),))

    return make


def _square_root(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * (z + (1 + x.abs()) / z)


def _left_domain(z: Tensor, x: Tensor) -> Tensor:
    """A contraction for z >= 0. Where z < 0 the map has no equilibrium."""
    return torch.where(z >= 0, 0.05 + 0.1 * z.square(), z - 1) + 0 * x


def _coarse(z: Tensor, x: Tensor) -> Tensor:
    """A contraction, computed as the difference of nearly equal numbers."""
    large = 1e-4 / torch.finfo(z.dtype).eps
    return (z @ _rotation(0.95, 1.2).to(z) + x + large) - large


def _coupled(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * z.flip(0) + 0.1 * z.mean(dim=0, keepdim=True) + x


def _drawn(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * z + x + 0.1 * x.abs().mean() * torch.randn_like(z)


SICK: dict[str, tuple[Cause, Make]] = {
    "slow contraction": (
        Cause.SLOW_CONTRACTION,
        _linear(lambda: _with_eigenvalues(0.995, 0.97, 0.9, 0.5, 0.1, -0.2), solver="picard"),
    ),
    "too few steps": (Cause.TOO_FEW_STEPS, _made(lambda z, x: 0.6 * torch.tanh(z) + x, solver="picard", max_steps=5)),
    "damping": (Cause.TOO_FEW_STEPS, _made(lambda z, x: 0.5 * torch.tanh(z) + x, solver=Picard(damping=0.05))),
    "expansion": (
        Cause.EXPANSION,
        _linear(lambda: _with_eigenvalues(1.4, 0.5, 0.3, 0.2, 0.1, -0.2), solver="picard"),
    ),
    "negative eigenvalue": (
        Cause.OSCILLATION,
        _linear(lambda: _with_eigenvalues(-1.3, 0.5, 0.3, 0.2, 0.1, -0.2), solver="picard"),
    ),
    "growing pair": (Cause.OSCILLATION, _linear(lambda: _rotation(1.05, 1.2), solver="picard")),
    "slow pair": (Cause.OSCILLATION, _linear(lambda: _rotation(0.99, 1.2), solver="picard")),
    "non-normal": (Cause.TRANSIENT, _linear(_non_normal, solver="picard", max_steps=40)),
    "logistic cycle": (
        Cause.LIMIT_CYCLE,
        _made(lambda z, x: 3.3 * z * (1 - z) + 0 * x, solver="picard", start=0.3),
    ),
    "saturated rotation": (
        Cause.LIMIT_CYCLE,
        _made(lambda z, x: torch.tanh(z @ (1.6 * _rotation(1.0, 1.2)).to(z)) + 0.1 * x, solver="picard", start=0.5),
    ),
    "long transient": (
        Cause.TRANSIENT,
        _linear(
            lambda: 0.9 * torch.eye(16).double() + torch.diag(torch.full((15,), 0.3, dtype=torch.float64), 1),
            solver="picard",
        ),
    ),
    "expansion in a fixed number of steps": (
        Cause.EXPANSION,
        _made(lambda z, x: 1.5 * z + x, solver="picard", stopping=Steps(30)),
    ),
    "several at zero": (
        Cause.SEVERAL_EQUILIBRIA,
        _made(lambda z, x: torch.tanh(3 * z) + 0 * x, curable=False),
    ),
    "several": (Cause.SEVERAL_EQUILIBRIA, _made(lambda z, x: torch.tanh(3 * z) + 0.01 * x, curable=False)),
    "continuum": (
        Cause.SINGULAR_JACOBIAN,
        _made(lambda z, x: z - 0.5 * (z - x).mean(dim=1, keepdim=True), curable=False),
    ),
    "none": (Cause.NO_EQUILIBRIUM, _made(lambda z, x: z + 1 + 0.1 * torch.sin(z) + 0 * x, curable=False)),
    "none in a fixed number of steps": (
        Cause.NO_EQUILIBRIUM,
        _made(lambda z, x: z + 1 + 0 * x, curable=False, solver="picard", stopping=Steps(30)),
    ),
    "none for a kink": (Cause.NO_EQUILIBRIUM, _made(lambda z, x: torch.relu(z) + x.abs(), curable=False)),
    "none, slower and slower": (
        Cause.NO_EQUILIBRIUM,
        _made(lambda z, x: torch.sqrt(z * z + 1) + 0 * x, curable=False, solver="picard"),
    ),
    "dropout": (Cause.MAP_CHANGES, _with_module(lambda: nn.Dropout(0.5))),
    "noise": (Cause.MAP_CHANGES, _made(_drawn, curable=False)),
    "batch normalization": (Cause.SAMPLES_MIX, _with_module(lambda: nn.BatchNorm1d(6))),
    "coupled": (Cause.SAMPLES_MIX, _made(_coupled, solver="picard")),
    "half line": (Cause.DOMAIN_LEFT, _made(_left_domain, solver=NewtonKrylov(), start=3.0)),
    "cancellation": (Cause.PRECISION_FLOOR, _made(_coarse, solver="picard", rtol=1e-6, max_steps=600)),
    "bfloat16 inside": (
        Cause.PRECISION_FLOOR,
        _made(lambda z, x: (-0.9 * z + x).bfloat16().to(z.dtype), solver="picard", max_steps=100),
    ),
    "tight": (
        Cause.TOLERANCE_TOO_TIGHT,
        _linear(lambda: _rotations(0.95), rtol=1e-18, max_steps=1500, solver="picard"),
    ),
    "loose": (
        Cause.TOLERANCE_TOO_LOOSE,
        _linear(lambda: _with_eigenvalues(0.6, -0.6, 0.3, 0.2, 0.1, -0.2), rtol=0.1, solver="picard"),
    ),
    "far, by steps of one size": (
        Cause.START_TOO_FAR,
        _made(lambda z, x: z + torch.tanh(200 + x - z), solver="picard"),
    ),
    "far": (Cause.START_TOO_FAR, _made(_square_root, solver="picard", start=1e9, max_steps=20)),
    "not finite": (Cause.NOT_FINITE, _made(lambda z, x: torch.sqrt(z + 1) + 0 * x, start=-2.0)),
}


def _imlp(dtype: torch.dtype, batch: int, generator: torch.Generator) -> Patient:
    from imixer import IMLP

    return Patient(IMLP(8, 8).to(dtype), (_normal(generator, dtype, batch, 5, 8),))


def _tanh_cell(dtype: torch.dtype, batch: int, generator: torch.Generator) -> Patient:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = spectral_norm(nn.Linear(8, 8), coeff=0.8)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(z) + x)

    return Patient(FixedPointLayer(Cell().to(dtype)), (_normal(generator, dtype, batch, 8),))


class TransformerBlock(nn.Module):
    """Attention and a small network, with the normalization after the residual connections and the input injected."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        q, k, v = self.qkv(z).chunk(3, dim=-1)
        z = self.norm1(0.3 * z + self.out(F.scaled_dot_product_attention(q, k, v)) + x)
        return self.norm2(0.3 * z + self.net(z) + x)  # type: ignore[no-any-return]


def _transformer(dtype: torch.dtype, batch: int, generator: torch.Generator) -> Patient:
    return Patient(FixedPointLayer(TransformerBlock().to(dtype)), (_normal(generator, dtype, batch, 5, 8),))


def _pytree(dtype: torch.dtype, batch: int, generator: torch.Generator) -> Patient:
    def f(z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"a": 0.5 * torch.cos(z["b"][:, 0]) + x, "b": 0.3 * torch.stack([z["a"], x], dim=1)}

    def init(x: Tensor) -> dict[str, Tensor]:
        return {"a": torch.zeros_like(x), "b": torch.zeros_like(torch.stack([x, x], dim=1))}

    return Patient(FixedPointLayer(f, init=init), (_normal(generator, dtype, batch, 4),))


def _contraction(dtype: torch.dtype, batch: int, generator: torch.Generator) -> Patient:
    a = _with_eigenvalues(0.7, -0.5, 0.4, 0.3, 0.2, 0.1).to(dtype)
    layer = FixedPointLayer(lambda z, x: z @ a.T + x, solver="picard")
    return Patient(layer, (_normal(generator, dtype, batch, 6),))


def _invertible(dtype: torch.dtype, batch: int, generator: torch.Generator) -> Patient:
    g = nn.Sequential(spectral_norm(nn.Linear(6, 16), coeff=0.8, method="exact"), nn.Tanh())
    g.append(spectral_norm(nn.Linear(16, 6), coeff=0.8, method="exact"))
    return Patient(InvertibleResidual(g.to(dtype)), (_normal(generator, dtype, batch, 6),))


def _newton(dtype: torch.dtype, batch: int, generator: torch.Generator) -> Patient:
    layer = FixedPointLayer(lambda z, x: 0.5 * (z + x / z), init=torch.ones_like, solver=Picard())
    return Patient(layer, (1 + _normal(generator, dtype, batch, 3).abs(),))


def _affine_newton(dtype: torch.dtype, batch: int, generator: torch.Generator) -> Patient:
    layer = FixedPointLayer(lambda z, x: 1.3 * z + torch.tanh(x), solver=NewtonKrylov())
    return Patient(layer, (_normal(generator, dtype, batch, 3),))


HEALTHY: dict[str, Callable[[torch.dtype, int, torch.Generator], Patient]] = {
    "iMLP": _imlp,
    "tanh cell": _tanh_cell,
    "transformer": _transformer,
    "pytree": _pytree,
    "linear contraction": _contraction,
    "invertible block": _invertible,
    "square root": _newton,
    "expansion solved by Newton": _affine_newton,
}


def sick(name: str, dtype: torch.dtype = torch.float64, batch: int = 4, unit: float = 1.0, seed: int = 0) -> Patient:
    """A sick patient of this name."""
    return SICK[name][1](dtype, batch, unit, torch.Generator().manual_seed(seed))


def healthy(name: str, dtype: torch.dtype = torch.float64, batch: int = 4, seed: int = 0) -> Patient:
    """A healthy one."""
    torch.manual_seed(seed)
    return HEALTHY[name](dtype, batch, torch.Generator().manual_seed(seed))
