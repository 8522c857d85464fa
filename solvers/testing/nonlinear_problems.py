"""Twenty-three classical systems of nonlinear equations with their usual starts, in float64.

The selection and the starts are those of NonlinearProblemLibrary.jl, which NonlinearSolve.jl is tested on. Every system
is a function of a batch, (B, D) to (B, D), whose rows do not depend on each other.

References:
    [MGH] Moré, Garbow and Hillstrom, "Testing unconstrained optimization software", ACM Trans. Math. Softw. 7 (1981).
    [MC] Moré and Cosnard, "Numerical solution of nonlinear equations", ACM Trans. Math. Softw. 5 (1979).
    [DS] Dennis and Schnabel, "Numerical methods for unconstrained optimization and nonlinear equations" (1983).
    [R] Rheinboldt, "Methods for solving systems of nonlinear equations", 2nd edition (1998).
    [H] Hammarling, as given by Higham, "Computing real square roots of a real matrix", Linear Algebra Appl. 88 (1987).
    [C] Chandrasekhar, "Radiative transfer" (1960).
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class NonlinearProblem:
    """A system ``F(x) = 0``.

    Attributes:
        F: The system, (B, D) to (B, D).
        x0: (1, D) the usual start.
        roots: (n, D) roots in closed form or to all digits; there may be others. None where none is known.

    Example:
        >>> from solvers import NewtonKrylov, solve
        >>> from solvers.testing import NONLINEAR
        >>> problem = NONLINEAR["Boggs"]
        >>> solve(problem.minus, problem.x0, NewtonKrylov(), rtol=1e-10).converged
        tensor([True])
    """

    F: Callable[[Tensor], Tensor]
    x0: Tensor
    roots: Tensor | None = None

    def minus(self, z: Tensor) -> Tensor:
        """The map ``z - F(z)``, whose fixed points are the roots."""
        return z - self.F(z)

    def plus(self, z: Tensor) -> Tensor:
        """The map ``z + F(z)``, whose fixed points are the roots as well."""
        return z + self.F(z)


def rosenbrock(x: Tensor) -> Tensor:
    """The generalized Rosenbrock function: a curved chain of equations [MGH, 21]."""
    return torch.cat((1 - x[:, :1], 10 * (x[:, 1:] - x[:, :-1] ** 2)), dim=1)


def powell_singular(x: Tensor) -> Tensor:
    """Powell's singular function: the Jacobian at the root has rank 2 [MGH, 13]."""
    a, b, c, d = x.unbind(1)
    return torch.stack((a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2), dim=1)


def powell_badly_scaled(x: Tensor) -> Tensor:
    """Powell's badly scaled function: the unknowns at the root differ by a factor of 1e6 [MGH, 3]."""
    a, b = x.unbind(1)
    return torch.stack((1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001), dim=1)


def wood(x: Tensor) -> Tensor:
    """The gradient of Wood's function up to factors [MGH, 14; MC]."""
    a, b, c, d = x.unbind(1)
    first, second = b - a**2, d - c**2
    return torch.stack(
        (
            -200 * a * first - (1 - a),
            200 * first + 20.2 * (b - 1) + 19.8 * (d - 1),
            -180 * c * second - (1 - c),
            180 * second + 20.2 * (d - 1) + 19.8 * (b - 1),
        ),
        dim=1,
    )


def helical_valley(x: Tensor) -> Tensor:
    """Fletcher and Powell's helical valley: an angle, in turns from -1/4 to 3/4, jumps where a = 0 > b [MGH, 7]."""
    a, b, c = x.unbind(1)
    turns = torch.atan(b / torch.where(a == 0, 1.0, a)) / (2 * math.pi)
    turns = torch.where(a == 0, 0.25 * torch.sign(b), torch.where(a < 0, turns + 0.5, turns))
    return torch.stack((10 * (c - 10 * turns), 10 * (torch.hypot(a, b) - 1), c), dim=1)


def watson(x: Tensor) -> Tensor:
    """A relative of the gradient of Watson's function [MGH, 20].

    The coefficients are those of NonlinearProblemLibrary.jl. It counts the powers of t from 1 where Watson's function
    counts them from 0, and has x1^2 and x2^2 where the gradient of that function has x1 x2 and x1^2.
    """
    n = x.shape[1]
    t = torch.arange(1, 30, dtype=x.dtype, device=x.device).unsqueeze(1) / 29  # (29, 1)
    number = torch.arange(1, n + 1, dtype=x.dtype, device=x.device)  # (n,)
    powers = t ** (number - 1)  # (29, n)
    value = x @ powers.T  # (B, 29)
    slope = x[:, 1:] @ (number[1:] * powers[:, :-1]).T
    weight = (slope - value**2 - 1) / t.T
    total = weight @ (number * powers) - (2 * weight * value * t.T) @ powers
    a, b = x[:, 0], x[:, 1]
    extra = torch.stack((3 * a - 2 * a**2 + 2 * a**3, b - b**2 - 1), dim=1)
    return total + functional.pad(extra, (0, n - 2))


def chebyquad(x: Tensor) -> Tensor:
    """Fletcher's Chebyquad: the points of a quadrature that is exact for Chebyshev polynomials [MGH, 35]."""
    n = x.shape[1]
    polynomials = [torch.ones_like(x), x]
    for _ in range(1, n):
        polynomials.append(2 * x * polynomials[-1] - polynomials[-2])
    # The means of the polynomials over [-1, 1].
    exact = x.new_tensor([0.0 if i % 2 else -1.0 / (i * i - 1) for i in range(1, n + 1)])
    return torch.stack([p.mean(dim=1) for p in polynomials[1:]], dim=1) - exact


def brown_almost_linear(x: Tensor) -> Tensor:
    """Brown's almost linear function: all equations but the last are linear [MGH, 27]."""
    n = x.shape[1]
    linear = x[:, :-1] + x.sum(dim=1, keepdim=True) - (n + 1)
    return torch.cat((linear, x.prod(dim=1, keepdim=True) - 1), dim=1)


def discrete_boundary_value(x: Tensor) -> Tensor:
    """Finite differences for ``u'' = (u + t + 1)^3 / 2`` with u = 0 at 0 and 1 [MGH, 28]."""
    h, t = _grid(x)
    left, right = functional.pad(x, (1, 1))[:, :-2], functional.pad(x, (1, 1))[:, 2:]
    return 2 * x - left - right + h**2 / 2 * (x + t + 1) ** 3


def discrete_integral_equation(x: Tensor) -> Tensor:
    """The same boundary value problem as an integral equation [MGH, 29]."""
    h, t = _grid(x)
    green = torch.minimum(t, t.unsqueeze(1)) * (1 - torch.maximum(t, t.unsqueeze(1)))
    cubes = (x + t + 1) ** 3
    # The point itself counts in both parts of the quadrature.
    return x + h / 2 * (cubes @ green + t * (1 - t) * cubes)


def trigonometric(x: Tensor) -> Tensor:
    """Spedicato's trigonometric function [MGH, 26]."""
    n = x.shape[1]
    return n - x.cos().sum(dim=1, keepdim=True) + _numbers(x) * (1 - x.cos()) - x.sin()


def variably_dimensioned(x: Tensor) -> Tensor:
    """The gradient of the variably dimensioned function, halved [MGH, 25]."""
    total = (_numbers(x) * (x - 1)).sum(dim=1, keepdim=True)
    return x - 1 + _numbers(x) * total * (1 + 2 * total**2)


def broyden_tridiagonal(x: Tensor) -> Tensor:
    """Broyden's tridiagonal function [MGH, 30]."""
    left, right = functional.pad(x, (1, 1))[:, :-2], functional.pad(x, (1, 1))[:, 2:]
    return (3 - 2 * x) * x - left - 2 * right + 1


def broyden_banded(x: Tensor) -> Tensor:
    """Broyden's banded function, with five bands below the diagonal and one above [MGH, 31]."""
    inside = functional.pad(x * (1 + x), (5, 1))
    n = x.shape[1]
    neighbors = sum(inside[:, shift : shift + n] for shift in (0, 1, 2, 3, 4, 6))
    return x * (2 + 5 * x**2) + 1 - neighbors


def matrix_square_root(x: Tensor) -> Tensor:
    """``X^2 - A`` with A zero except for 1e-4 on the diagonal and a 1 beside it in the first row [H]."""
    size = math.isqrt(x.shape[1])
    square = 1e-4 * torch.eye(size, dtype=x.dtype, device=x.device)
    square[0, 1] = 1.0
    matrix = x.view(-1, size, size)
    return (matrix @ matrix - square).flatten(1)


def dennis_schnabel(x: Tensor) -> Tensor:
    """A line and a circle [DS, example 5.4.1]."""
    return torch.stack((x.sum(dim=1) - 3, (x**2).sum(dim=1) - 9), dim=1)


def sample_18(x: Tensor) -> Tensor:
    """``b^2 h(a) = a h(b) = 0`` with h(u) = (1 - exp(-u^2)) / u: both axes consist of roots."""

    def h(u: Tensor) -> Tensor:
        square = torch.where(u == 0, 1.0, u**2)
        return u * torch.where(u == 0, 1.0, -torch.expm1(-square) / square)

    a, b = x.unbind(1)
    return torch.stack((b**2 * h(a), a * h(b)), dim=1)


def sample_19(x: Tensor) -> Tensor:
    """``x |x|^2``: the Jacobian is zero at the root."""
    return x * (x**2).sum(dim=1, keepdim=True)


def cubic_with_double_root(x: Tensor) -> Tensor:
    """``x (x - 5)^2``: a simple root and a double one."""
    return x * (x - 5) ** 2


def freudenstein_roth(x: Tensor) -> Tensor:
    """Freudenstein and Roth's function: its norm has a minimum near (11.4, -0.9) that is no root [MGH, 2]."""
    a, b = x.unbind(1)
    return torch.stack((a - 13 + ((5 - b) * b - 2) * b, a - 29 + ((b + 1) * b - 14) * b), dim=1)


def boggs(x: Tensor) -> Tensor:
    """Boggs's function, with three roots and singular Jacobians between them [R]."""
    a, b = x.unbind(1)
    return torch.stack((a**2 - b + 1, a - torch.cos(math.pi / 2 * b)), dim=1)


def chandrasekhar(x: Tensor) -> Tensor:
    """Chandrasekhar's H-equation with c = 0.9 and the nodes i / n [C]."""
    mu = _numbers(x) / x.shape[1]
    kernel = 0.9 / (2 * x.shape[1]) * mu.unsqueeze(1) / (mu.unsqueeze(1) + mu)
    return x - 1 / (1 - x @ kernel.T)


def _numbers(x: Tensor) -> Tensor:
    """(D,) 1, 2, ... D."""
    return torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)


def _grid(x: Tensor) -> tuple[float, Tensor]:
    """The distance of equidistant points within (0, 1), and the points (D,)."""
    return 1 / (x.shape[1] + 1), _numbers(x) / (x.shape[1] + 1)


def _rows(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


_TEN = torch.arange(1, 11, dtype=torch.float64).unsqueeze(0)  # (1, 10)
_ONES = torch.ones_like(_TEN)
_PARABOLA = _TEN * (_TEN - 11) / 121
_BADLY_SCALED = [1.0981593296997054e-05, 9.106146739866]
_CHEBYQUAD = 1 / math.sqrt(3)

NONLINEAR: dict[str, NonlinearProblem] = {
    "Generalized Rosenbrock": NonlinearProblem(rosenbrock, _rows([-1.2] + 9 * [1.0]), _ONES),
    "Powell singular": NonlinearProblem(powell_singular, _rows([3.0, -1.0, 0.0, 1.0]), _rows(4 * [0.0])),
    "Powell badly scaled": NonlinearProblem(
        powell_badly_scaled, _rows([0.0, 1.0]), _rows(_BADLY_SCALED, _BADLY_SCALED[::-1])
    ),
    "Wood": NonlinearProblem(wood, _rows([-3.0, -1.0, -3.0, -1.0]), _rows(4 * [1.0])),
    "Helical valley": NonlinearProblem(helical_valley, _rows([-1.0, 0.0, 0.0]), _rows([1.0, 0.0, 0.0])),
    "Watson": NonlinearProblem(watson, _rows([0.0, 0.0])),
    "Chebyquad": NonlinearProblem(
        chebyquad, _rows([0.0, 2 / 3]), _rows([-_CHEBYQUAD, _CHEBYQUAD], [_CHEBYQUAD, -_CHEBYQUAD])
    ),
    "Brown almost linear": NonlinearProblem(brown_almost_linear, 0.5 * _ONES, _ONES),
    "Discrete boundary value": NonlinearProblem(discrete_boundary_value, _PARABOLA),
    "Discrete integral equation": NonlinearProblem(discrete_integral_equation, _PARABOLA),
    "Trigonometric": NonlinearProblem(trigonometric, 0.1 * _ONES, 0 * _ONES),
    "Variably dimensioned": NonlinearProblem(variably_dimensioned, 1 - _TEN / 10, _ONES),
    "Broyden tridiagonal": NonlinearProblem(broyden_tridiagonal, -_ONES),
    "Broyden banded": NonlinearProblem(broyden_banded, -_ONES),
    "Hammarling 2 by 2": NonlinearProblem(
        matrix_square_root, _rows([1.0, 0.0, 0.0, 1.0]), _rows([0.01, 50.0, 0.0, 0.01], [-0.01, -50.0, 0.0, -0.01])
    ),
    "Hammarling 3 by 3": NonlinearProblem(
        matrix_square_root,
        torch.eye(3, dtype=torch.float64).view(1, 9),
        _rows([0.01, 50.0, 0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 0.01]),
    ),
    "Dennis and Schnabel": NonlinearProblem(dennis_schnabel, _rows([1.0, 5.0]), _rows([0.0, 3.0], [3.0, 0.0])),
    "Sample 18": NonlinearProblem(sample_18, _rows([2.0, 2.0]), _rows([0.0, 0.0], [0.0, 7.0], [7.0, 0.0])),
    "Sample 19": NonlinearProblem(sample_19, _rows([3.0, 3.0]), _rows([0.0, 0.0])),
    "x (x - 5)^2": NonlinearProblem(cubic_with_double_root, _rows([1.0]), _rows([0.0], [5.0])),
    "Freudenstein-Roth": NonlinearProblem(freudenstein_roth, _rows([0.5, -2.0]), _rows([5.0, 4.0])),
    "Boggs": NonlinearProblem(boggs, _rows([1.0, 0.0]), _rows([0.0, 1.0], [-math.sqrt(0.5), 1.5], [-1.0, 2.0])),
    "Chandrasekhar": NonlinearProblem(chandrasekhar, _ONES),
}
