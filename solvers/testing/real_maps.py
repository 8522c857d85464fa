"""Fixed-point maps that people solve in practice, small enough for tests.

Every map is made by a function ``(dtype, batch=...)`` of the dtype and the number of samples, from a fixed seed, in
float64, and then converted, so that all dtypes solve the same problems. The state of some is a pytree.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from solvers.testing.dense_newton import entries, newton_step


@dataclasses.dataclass(frozen=True)
class RealMap:
    """A batch of fixed-point problems.

    Attributes:
        f: The map; takes a state and returns one like it.
        z0: The start, a pytree of tensors with the samples as their first dimension.
        solution: (B, n) ``quantity`` at the fixed point.
        quantity: What the equation determines of a state, as (B, n). By default all of its entries; the potentials of
            optimal transport, for example, are determined up to a constant, but their plan is unique.
    """

    f: Callable[[Any], Any]
    z0: Any
    solution: Tensor
    quantity: Callable[[Any], Tensor]

    def error(self, state: Any) -> Tensor:
        """(B,) relative error of the quantity at ``state``."""
        difference = torch.linalg.vector_norm(self.quantity(state).to(self.solution) - self.solution, dim=1)
        size = torch.linalg.vector_norm(self.solution, dim=1)
        error: Tensor = difference / size
        return error


def multiscale(dtype: torch.dtype, batch: int = 4) -> RealMap:
    """A convolutional map of two resolutions with group normalization, as in a multiscale equilibrium network.

    At each resolution i, with convolutions W and V, 1 x 1 convolutions and resampling R, and the injected image x_i,

        h_i = GN(relu(z_i + GN(x_i + V_i relu(GN(W_i z_i))))),    f_i(z) = GN(relu(h_i + sum_(j != i) R_ij h_j)).

    Source: Bai, Koltun and Kolter, "Multiscale deep equilibrium models", NeurIPS 2020, section 3 (with 8 and 16
    channels on 16 x 16 and 8 x 8 pixels).
    """
    generator = torch.Generator().manual_seed(1)
    normal = functools.partial(_normal, generator=generator)
    fine, coarse = (batch, 8, 16, 16), (batch, 16, 8, 8)
    inner = {"fine": normal(8, 8, 3, 3) / 9, "coarse": normal(16, 16, 3, 3) / 12}
    outer = {"fine": normal(8, 8, 3, 3) / 18, "coarse": normal(16, 16, 3, 3) / 24}
    up, down = normal(8, 16, 1, 1) / 4, normal(16, 8, 3, 3) / 9
    image = {"fine": 2 * normal(*fine), "coarse": 2 * normal(*coarse)}

    def group_norm(h: Tensor) -> Tensor:
        return F.group_norm(h, 4)

    def make(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        w, v, x, (to_fine, to_coarse) = tree_map(lambda tensor: tensor.to(dtype), (inner, outer, image, (up, down)))

        def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
            h = {}
            for name in z:
                branch = F.conv2d(F.relu(group_norm(F.conv2d(z[name], w[name], padding=1))), v[name], padding=1)
                h[name] = group_norm(F.relu(z[name] + group_norm(x[name] + branch)))
            lifted = F.interpolate(F.conv2d(h["coarse"], to_fine), scale_factor=2.0, mode="nearest")
            lowered = F.conv2d(h["fine"], to_coarse, stride=2, padding=1)
            return {
                "fine": group_norm(F.relu(h["fine"] + lifted)),
                "coarse": group_norm(F.relu(h["coarse"] + lowered)),
            }

        return f

    z0 = {"fine": torch.zeros(fine), "coarse": torch.zeros(coarse)}
    return _converted(make, z0, dtype, newton=False)


def sinkhorn(dtype: torch.dtype, batch: int = 4, *, epsilon: float) -> RealMap:
    """Sinkhorn's iteration in the log domain, for the potential g of entropic optimal transport, 64 to 64 points.

    With costs c, uniform weights and the regularization epsilon,

        h_i = -epsilon logsumexp_j((g_j - c_ij) / epsilon),    f(g)_j = -epsilon logsumexp_i((h_i - c_ij) / epsilon),

    up to terms that do not depend on i and j. A potential is determined up to a constant.

    Source: Peyre and Cuturi, "Computational optimal transport" (2019), remark 4.22 and equation (4.44).
    """
    cost = _costs(batch)

    def make(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        c = cost.to(dtype)
        weight = math.log(64)

        def f(g: Tensor) -> Tensor:
            h = -epsilon * (torch.logsumexp((g.unsqueeze(1) - c) / epsilon, dim=2) - weight)
            return -epsilon * (torch.logsumexp((h.unsqueeze(2) - c) / epsilon, dim=1) - weight)

        return f

    def centered(g: Tensor) -> Tensor:
        return g - g.mean(dim=1, keepdim=True)

    return _converted(make, torch.zeros(batch, 64), dtype, quantity=centered)


def plain_sinkhorn(dtype: torch.dtype, batch: int = 4, *, epsilon: float) -> RealMap:
    """Sinkhorn's iteration for the scalings u and v of entropic optimal transport, 64 to 64 points.

    With K = exp(-c / epsilon) and uniform weights a and b,

        f(u, v) = (a / K v, b / K' (a / K v)).

    The scalings span many orders of magnitude and must stay positive; they are determined up to a common factor.

    Source: Cuturi, "Sinkhorn distances", NeurIPS 2013, algorithm 1.
    """
    kernel = torch.exp(-_costs(batch) / epsilon)

    def make(dtype: torch.dtype) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        k = kernel.to(dtype)

        def f(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            u = 1 / 64 / (k @ state[1].unsqueeze(2)).squeeze(2)
            return u, 1 / 64 / (u.unsqueeze(1) @ k).squeeze(1)

        return f

    def plan(state: tuple[Tensor, Tensor]) -> Tensor:
        u, v = (part.to(torch.float64) for part in state)
        return (u.unsqueeze(2) * kernel * v.unsqueeze(1)).flatten(1)

    return _converted(
        make, (torch.ones(batch, 64), torch.ones(batch, 64)), dtype, quantity=plan, steps=3000, newton=False
    )


def mixture(dtype: torch.dtype, batch: int = 4, *, dims: int, unconstrained: bool) -> RealMap:
    """Expectation-maximization for a mixture of three Gaussians with diagonal covariances, fitted to 300 points.

    With responsibilities r_ik proportional to w_k N(x_i; m_k, s_k),

        w_k <- mean_i r_ik,    m_k <- sum_i r_ik x_i / sum_i r_ik,    s_k <- sum_i r_ik (x_i - m_k)^2 / sum_i r_ik.

    The state is (w, m, s) as it is, or unconstrained: (log w, m, log s).

    Source: Dempster, Laird and Rubin, "Maximum likelihood from incomplete data via the EM algorithm", J. R. Statist.
    Soc. B 39 (1977), section 4.3.
    """
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([[-3.0, 1.5], [0.0, -1.5], [3.75, 0.75]], dtype=torch.float64)[:, :dims] * (
        1.5 if dims == 1 else 1.0
    )
    label = torch.randint(3, (batch, 300), generator=generator)
    data = centers[label] + _normal(batch, 300, dims, generator=generator)
    start = (
        torch.full((batch, 3), 1 / 3, dtype=torch.float64),
        0.5 * centers.expand(batch, 3, dims),
        torch.ones(batch, 3, dims, dtype=torch.float64),
    )

    def encode(w: Tensor, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (w.log(), m, s.log()) if unconstrained else (w, m, s)

    def make(dtype: torch.dtype) -> Callable[[Any], Any]:
        x = data.to(dtype).unsqueeze(2)  # (B, 300, 1, dims)

        def f(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            w, m, s = (part.unsqueeze(1) for part in state)
            log_w, log_s = (w, s) if unconstrained else (w.log(), s.log())
            joint = log_w - 0.5 * ((x - m) ** 2 / log_s.exp() + log_s).sum(dim=3)
            r = torch.softmax(joint, dim=2)  # (B, 300, 3)
            total = r.sum(dim=1).unsqueeze(2)  # (B, 3, 1)
            mean = (r.unsqueeze(3) * x).sum(dim=1) / total
            variance = (r.unsqueeze(3) * (x - mean.unsqueeze(1)) ** 2).sum(dim=1) / total
            return encode(total.squeeze(2) / x.shape[1], mean, variance)

        return f

    return _converted(make, encode(*start), dtype, steps=500)


def bellman(dtype: torch.dtype, batch: int = 4, *, actions: int) -> RealMap:
    """Value iteration for a random Markov decision process of 100 states, discounted by gamma = 0.99.

        f(v)_s = max_a (r_sa + gamma sum_t p_sat v_t)

    where every action leads to five states. With one action it evaluates a policy, and the map is linear.

    Source: Puterman, "Markov decision processes" (1994), equation (6.3.2).
    """
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(batch, 100, actions, dtype=torch.float64, generator=generator)
    scores = torch.rand(batch, 100, actions, 100, dtype=torch.float64, generator=generator)
    chosen = scores.topk(5, dim=3)
    p = torch.zeros_like(scores).scatter(3, chosen.indices, chosen.values)
    p = p / p.sum(dim=3, keepdim=True)

    def make(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        r, transition = reward.to(dtype), p.to(dtype)

        def f(v: Tensor) -> Tensor:
            expected = (transition.flatten(1, 2) @ v.unsqueeze(2)).view(batch, 100, actions)
            return (r + 0.99 * expected).amax(dim=2)

        return f

    return _converted(make, torch.zeros(batch, 100), dtype)


def monotone(dtype: torch.dtype, batch: int = 4) -> RealMap:
    """A monotone operator network by forward-backward splitting: 100 units, 20 inputs.

        f(z) = relu(z - alpha ((I - W) z - U x - b)),    W = (1 - m) I - A'A + B - B',    m = 0.1, alpha = 0.1.

    Source: Winston and Kolter, "Monotone operator equilibrium networks", NeurIPS 2020, equations (7) and (10).
    """
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(_normal, generator=generator)
    a, b = normal(100, 100) / 10, normal(100, 100) / 10
    w = 0.9 * torch.eye(100, dtype=torch.float64) - a.T @ a + b - b.T
    injected = normal(batch, 20) @ normal(20, 100) / 4 + normal(100)

    def make(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        weight, x = w.to(dtype), injected.to(dtype)
        return lambda z: F.relu(z - 0.1 * (z - z @ weight.T - x))

    return _converted(make, torch.zeros(batch, 100), dtype)


def poisson(dtype: torch.dtype, batch: int = 4) -> RealMap:
    """Jacobi's iteration for Poisson's equation on a grid of 64 x 64 points with zero boundary values.

        f(u)_ij = (u_(i-1)j + u_(i+1)j + u_i(j-1) + u_i(j+1) + h^2 b_ij) / 4

    with smooth random sources b. Its spectral radius is cos(pi / 65) = 0.9988.

    Source: Saad, "Iterative methods for sparse linear systems" (2003), section 4.1.
    """
    n = 64
    wave = math.pi * torch.arange(1, n + 1, dtype=torch.float64) / (n + 1)
    sines = torch.sin(wave.unsqueeze(1) * torch.arange(1, n + 1, dtype=torch.float64)) * math.sqrt(2 / (n + 1))
    modes = _normal(batch, n, n, generator=torch.Generator().manual_seed(0))
    mode = torch.arange(1, n + 1, dtype=torch.float64)
    modes = modes / (mode.unsqueeze(1) ** 2 + mode**2)
    eigenvalue = (wave.cos().unsqueeze(1) + wave.cos()) / 2
    source = sines @ modes @ sines
    solution = sines @ (modes / (1 - eigenvalue)) @ sines

    def make(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        b = source.to(dtype)

        def f(u: Tensor) -> Tensor:
            v = F.pad(u, (1, 1, 1, 1))
            return (v[:, :-2, 1:-1] + v[:, 2:, 1:-1] + v[:, 1:-1, :-2] + v[:, 1:-1, 2:]) / 4 + b

        return f

    return RealMap(make(dtype), torch.zeros(batch, n, n, dtype=dtype), solution.flatten(1), entries)


def page_rank(dtype: torch.dtype, batch: int = 4) -> RealMap:
    """Personalized PageRank with damping 0.85 on a random graph of 500 pages that link to their neighborhoods.

        f(p) = 0.85 M p + 0.15 t

    where M has the columns of a random surfer and t is the distribution of a restart.

    Source: Page, Brin, Motwani and Winograd, "The PageRank citation ranking" (1999), section 2.
    """
    generator = torch.Generator().manual_seed(0)
    links = torch.zeros(500, 500, dtype=torch.float64)
    page = torch.arange(500)
    for _ in range(6):
        links[(page + torch.randint(-12, 13, (500,), generator=generator)) % 500, page] += 1
    m = links / links.sum(dim=0)
    restart = torch.rand(batch, 500, dtype=torch.float64, generator=generator)
    restart = restart / restart.sum(dim=1, keepdim=True)
    solution = 0.15 * torch.linalg.solve(torch.eye(500, dtype=torch.float64) - 0.85 * m, restart.T).T

    surfer, t = m.to(dtype), restart.to(dtype)
    return RealMap(lambda p: 0.85 * p @ surfer.T + 0.15 * t, t, solution, entries)


def kepler(dtype: torch.dtype, batch: int = 64) -> RealMap:
    """Kepler's equation for the eccentric anomaly, ``f(E) = M + e sin E`` with eccentricities e from 0.01 to 0.99.

    Source: Kepler, "Epitome astronomiae Copernicanae" (1621); Danby, "Fundamentals of celestial mechanics" (1988),
    section 6.6.
    """
    generator = torch.Generator().manual_seed(0)
    eccentricity = torch.linspace(0.01, 0.99, batch, dtype=torch.float64).unsqueeze(1)
    anomaly = 2 * math.pi * torch.rand(batch, 1, dtype=torch.float64, generator=generator)

    def make(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        e, m = eccentricity.to(dtype), anomaly.to(dtype)
        return lambda z: m + e * torch.sin(z)

    return _converted(make, anomaly, dtype)


def hartree(dtype: torch.dtype, batch: int = 4) -> RealMap:
    """A self-consistent field: the density of four particles in a potential well, on 40 points of a line.

    With H(n) = -d^2/dx^2 / 2 + x^2 / 2 + (w * n), where w(x) = 1 / sqrt(x^2 + 1) repels and its strength differs from
    sample to sample, f(n) is the density of the four lowest eigenvectors of H(n).

    Source: Szabo and Ostlund, "Modern quantum chemistry" (1989), section 3.1, without exchange.
    """
    x = torch.linspace(-6, 6, 40, dtype=torch.float64)
    h = float(x[1] - x[0])
    ones = torch.ones(39, dtype=torch.float64)
    kinetic = (torch.eye(40, dtype=torch.float64) - (torch.diag(ones, 1) + torch.diag(ones, -1)) / 2) / h**2
    core = kinetic + torch.diag(x**2 / 2)
    repulsion = 1 / torch.sqrt((x.unsqueeze(1) - x) ** 2 + 1)
    strength = torch.linspace(0.5, 4.0, batch, dtype=torch.float64).unsqueeze(1)

    def make(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        fixed, w, c = core.to(dtype), repulsion.to(dtype), strength.to(dtype)

        def f(n: Tensor) -> Tensor:
            orbitals = torch.linalg.eigh(fixed + torch.diag_embed(c * (n @ w)))[1][:, :, :4]
            density: Tensor = orbitals.square().sum(dim=2)
            return density

        return f

    return _converted(make, torch.full((batch, 40), 0.1), dtype)


REAL_MAPS: dict[str, Callable[..., RealMap]] = {
    "multiscale": multiscale,
    "sinkhorn 0.1": functools.partial(sinkhorn, epsilon=0.1),
    "sinkhorn 0.01": functools.partial(sinkhorn, epsilon=0.01),
    "sinkhorn 0.003": functools.partial(sinkhorn, epsilon=0.003),
    "plain sinkhorn 0.1": functools.partial(plain_sinkhorn, epsilon=0.1),
    "plain sinkhorn 0.01": functools.partial(plain_sinkhorn, epsilon=0.01),
    "mixture 1-d": functools.partial(mixture, dims=1, unconstrained=False),
    "mixture 1-d, log": functools.partial(mixture, dims=1, unconstrained=True),
    "mixture 2-d": functools.partial(mixture, dims=2, unconstrained=False),
    "mixture 2-d, log": functools.partial(mixture, dims=2, unconstrained=True),
    "policy evaluation": functools.partial(bellman, actions=1),
    "value iteration": functools.partial(bellman, actions=4),
    "monotone": monotone,
    "poisson": poisson,
    "page rank": page_rank,
    "kepler": kepler,
    "hartree": hartree,
}


def _converted(
    make: Callable[[torch.dtype], Callable[[Any], Any]],
    z0: Any,
    dtype: torch.dtype,
    *,
    quantity: Callable[[Any], Tensor] | None = None,
    steps: int = 1000,
    newton: bool = True,
) -> RealMap:
    """The problem in ``dtype``, with the solution in float64 from plain steps, and then Newton's by dense matrices."""
    quantity = quantity or entries
    exact = make(torch.float64)
    z = tree_map(lambda tensor: tensor.to(torch.float64), z0)
    for _ in range(steps):
        z = exact(z)
    for _ in range(4 if newton else 0):
        z = newton_step(exact, z)
    return RealMap(make(dtype), tree_map(lambda tensor: tensor.to(dtype), z0), quantity(z), quantity)


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _costs(batch: int) -> Tensor:
    """(B, 64, 64) half the squared distances of random points in the unit square."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(batch, 64, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    return (x.unsqueeze(2) - y.unsqueeze(1)).square().sum(dim=3) / 2
