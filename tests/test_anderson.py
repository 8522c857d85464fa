"""Anderson acceleration: its published histories, its least squares, its safeguard, its memory, its gradients."""

import dataclasses

import pytest
import torch
from torch.func import grad, jvp, vmap

from solvers import Anderson, Picard, Solver, solve
from solvers.testing import BANK
from solvers.testing.problems import imlp, linear

FIXED = {"rtol": None, "atol": None}


def test_few_calls_in_float32():
    for radius, memory, most in ((0.9, 5, 35), (0.9, 10, 25), (0.99, 10, 65)):
        bank = linear(torch.float32, radius=radius)
        solution = solve(bank.f, bank.z0, Anderson(memory=memory), rtol=1e-5, atol=0, max_steps=200, on_failure="raise")
        assert solution.num_evals <= most


@pytest.mark.parametrize("least_squares", ["gram", "qr"])
@pytest.mark.parametrize(("memory", "entries"), list(enumerate([11, 10, 10, 11, 12, 12], start=1)))
def test_h_equation_histories_are_those_of_toth_and_kelley(memory, entries, least_squares):
    """Toth and Kelley (2015), table 4: entries of the residual history until it is reduced by 1e-8."""
    bank = BANK["H-equation"](torch.float64)
    first = float((bank.f(bank.z0) - bank.z0).square().mean().sqrt())
    solver = Anderson(memory=memory, least_squares=least_squares)
    solution = solve(bank.f, bank.z0, solver, rtol=0, atol=1e-8 * first, history=True, on_failure="raise")
    assert len(solution.history) == solution.num_evals == entries


def test_contractive_2x2_takes_four_steps():
    bank = BANK["contractive 2x2"](torch.float64)
    picard = solve(bank.f, bank.z0, Picard(), rtol=0, atol=1e-8)
    anderson = solve(bank.f, bank.z0, Anderson(memory=2), rtol=0, atol=1e-8, history=True)
    assert picard.num_evals > 10
    assert len(anderson.history) == 4
    assert torch.allclose(anderson.value, bank.solution, atol=1e-12)


def test_alex_residuals_with_orthogonalized_differences():
    """The history of an accurate Anderson(2); nearly equal columns amplify the rounding in its last entries."""
    expected = [0.650111, 0.448661, 0.026148, 0.0725389, 1.53107e-4, 1.18512e-5, 1.82476e-8]
    bank = BANK["alex"](torch.float64)
    residuals = []

    def f(z):
        fz = bank.f(z)
        residuals.append(float((fz - z).norm()))
        return fz

    solve(f, bank.z0, Anderson(memory=2, least_squares="qr"), max_steps=8, **FIXED)
    assert residuals[:5] == pytest.approx(expected[:5], rel=1e-5)
    assert residuals[5:7] == pytest.approx(expected[5:], rel=1e-2)
    assert residuals[7] < 2e-13


def test_dependent_columns_are_taken_for_one():
    """Through its Gram matrix Anderson takes the two nearly equal columns of alex for one, and needs fewer steps."""
    bank = BANK["alex"](torch.float64)
    solution = solve(bank.f, bank.z0, Anderson(memory=2), rtol=1e-14, atol=0, on_failure="raise")
    assert solution.num_evals <= 8


@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("least_squares", ["gram", "qr"])
def test_proposal_is_the_least_squares_one_from_any_points(least_squares, damping):
    """``absorb`` takes points that nobody proposed; the proposal is the formula's, solved by LAPACK's lstsq."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(9, 3, 12, dtype=torch.float64, generator=generator)
    solver = Anderson(memory=4, damping=damping, least_squares=least_squares, safeguard=False)
    state = solver.init(torch.cos, points[0])
    for z in points[1:]:
        state = solver.absorb(state, z, z.cos())
    z, fz = points[-5:], points[-5:].cos()
    df, dg = fz.diff(dim=0).permute(1, 2, 0), (fz - z).diff(dim=0).permute(1, 2, 0)  # (3, 12, 4)
    g = (fz - z)[-1]
    gamma = torch.linalg.lstsq(dg, g.unsqueeze(2)).solution
    expected = z[-1] + damping * g - ((df - (1 - damping) * dg) @ gamma).squeeze(2)
    assert torch.allclose(solver.propose(state), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("least_squares", ["gram", "qr"])
@pytest.mark.parametrize("radius", [0.5, 0.999])
def test_nearly_dependent_columns_do_no_harm(radius, least_squares, dtype):
    """A memory of 20: as few calls as a short one needs, and hundreds of steps past the solution stay there."""
    bank = linear(dtype, radius=radius, batch=8, size=64)
    rtol = 1e-5 if dtype == torch.float32 else 1e-11
    solver = Anderson(memory=20, least_squares=least_squares)
    options = {"rtol": rtol, "atol": 0.0, "max_steps": 3000, "on_failure": "raise"}
    calls = solve(bank.f, bank.z0, solver, **options).num_evals
    assert calls <= solve(bank.f, bank.z0, Anderson(memory=5), **options).num_evals
    past = solve(bank.f, bank.z0, solver, max_steps=calls + 200, history=True, **FIXED)
    assert past.history[calls:].max() <= rtol


def test_columns_of_all_lengths_count():
    """A column that is a million times shorter than another keeps its digits: the ridge is relative to itself."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2, 8, 3, generator=generator))[0].mT  # (2, 3, 8)
    solver = Anderson(memory=2, safeguard=False)
    for lengths in ((1.0, 1e-6), (1e-6, 1.0), (1e-6, 1e-6), (1e6, 1.0)):
        # The residuals are g0, g0 - a, g0 - a - b; the best combination removes the parts along a and b.
        a, b = lengths[0] * basis[:, 0], lengths[1] * basis[:, 1]
        last = basis[:, 2] * 1e-6 + 0.5 * a + 0.25 * b
        state = solver.init(lambda z, g=last + a + b: z + g, torch.zeros(2, 8))
        # At z = 0 throughout, so that the image is the residual.
        for g in (last + b, last):
            state = solver.absorb(state, torch.zeros(2, 8), g)
        error = (solver.propose(state) - basis[:, 2] * 1e-6).norm(dim=1)
        assert (error <= 1e-5 * max(lengths)).all(), lengths


class OneSidedSprings:
    """Gradient descent on springs along a_i that push a hundred times harder than they pull: contracts, with kinks.

    Attributes:
        a: (B, k, D).
        rest: (B, k) where the springs change sides.
        start: (B, D).
    """

    def __init__(self, rows=slice(None), dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        a, rest, start = (
            torch.randn(64, *shape, generator=generator, dtype=torch.float64)[rows] for shape in ((10, 3), (10,), (3,))
        )
        self.length = (1 / torch.linalg.matrix_norm(a, 2).square().unsqueeze(1)).to(dtype)
        self.a, self.rest, self.start = a.to(dtype), 10 * rest.to(dtype), 10 * start.to(dtype)

    def __call__(self, z):
        u = (self.a * z.unsqueeze(1)).sum(2) - self.rest
        force = torch.where(u > 0, u, 0.01 * u)
        return 0.999 * (z - self.length * (self.a * force.unsqueeze(2)).sum(1))


def num_steps(f, solver: Solver, max_steps=2000):
    """(B,) steps that each sample needs; infinite where they do not suffice."""
    solution = solve(f, f.start, solver, rtol=1e-5, atol=0, max_steps=max_steps, on_failure="ignore")
    return solution.num_steps.double().masked_fill(~solution.converged, torch.inf)


@pytest.mark.parametrize(("memory", "dtype"), [(5, torch.float32), (5, torch.float64), (10, torch.float64)], ids=str)
def test_safeguard_helps_where_extrapolation_leads_astray(memory, dtype):
    f = OneSidedSprings(dtype=dtype)
    picard = num_steps(f, Picard())
    without = num_steps(f, Anderson(memory=memory, safeguard=False)) / picard
    assert (without == torch.inf).sum() >= 3
    with_safeguard = num_steps(f, Anderson(memory=memory)) / picard
    assert with_safeguard.median() < 0.25
    assert with_safeguard.max() <= memory + 1


def test_safeguard_costs_no_calls_on_the_bank():
    for name in (
        "linear 0.5",
        "linear 0.9",
        "linear 0.99",
        "rotation",
        "cos",
        "cos, marginal",
        "tanh",
        "imlp",
        "mixed",
    ):
        for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            bank = imlp(dtype, rows=64) if name == "imlp" else BANK[name](dtype)
            for memory in (2, 5, 10):
                counts = [
                    solve(
                        bank.f,
                        bank.z0,
                        Anderson(memory=memory, safeguard=safeguard),
                        rtol=rtol,
                        atol=0,
                        max_steps=200,
                        on_failure="ignore",
                    ).num_evals
                    for safeguard in (True, False)
                ]
                assert counts[0] == counts[1], (name, dtype, memory)


@pytest.mark.parametrize("damping", [1.0, 0.5])
@pytest.mark.parametrize("least_squares", ["gram", "qr"])
def test_steps_in_vain_are_taken_back(least_squares, damping):
    """One sample's residuals rise for ``memory`` steps: its next step is the plain one from before; no other's is."""
    solver = Anderson(memory=3, damping=damping, least_squares=least_squares)
    plain = dataclasses.replace(solver, safeguard=False)
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(6, 2, 5, dtype=torch.float64, generator=generator)
    # The norms of the residuals at the points, for a sample that goes astray after the third and one that does not.
    norms = torch.tensor([[3.0, 2.0, 1.0, 1.5, 1.2, 1.1], [3.0, 2.0, 1.0, 1.5, 0.9, 1.1]], dtype=torch.float64).T
    residuals = torch.nn.functional.normalize(torch.randn(6, 2, 5, dtype=torch.float64, generator=generator), dim=2)
    residuals = norms.unsqueeze(2) * residuals
    states = [s.init(lambda z: z + residuals[0], points[0]) for s in (solver, plain)]
    for k in range(1, 6):
        proposals = [s.propose(state) for s, state in zip((solver, plain), states, strict=True)]
        assert torch.allclose(*proposals)
        states = [
            s.absorb(state, points[k], points[k] + residuals[k])
            for s, state in zip((solver, plain), states, strict=True)
        ]
    astray, fine = solver.propose(states[0])
    assert torch.allclose(astray, points[2, 0] + damping * residuals[2, 0])
    assert torch.allclose(fine, plain.propose(states[1])[1])


def test_safeguarded_samples_are_independent():
    together = num_steps(OneSidedSprings(), Anderson())
    alone = torch.cat([num_steps(OneSidedSprings(slice(i, i + 1)), Anderson()) for i in range(64)])
    assert torch.equal(alone, together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("solver", [Anderson(), Anderson(memory=10), Anderson(damping=0.7)], ids=str)
def test_gradients_where_the_solution_is_zero(solver, dtype):
    """Fixed steps far past a solution of exactly zero, where all differences underflow in the end."""
    rate = torch.tensor([[0.0], [0.3], [0.9], [-0.5]], dtype=dtype)
    mix = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.5]], dtype=dtype)
    eye = torch.eye(3, dtype=dtype)
    expected = torch.stack([torch.linalg.solve(eye - r * mix, torch.ones(3, dtype=dtype)) for r in rate.squeeze(1)])
    for steps in (30, 300):
        shift = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
        value = solve(
            lambda z, b=shift: rate * (z @ mix) + b, torch.ones(4, 3, dtype=dtype), solver, max_steps=steps, **FIXED
        ).value
        (gradient,) = torch.autograd.grad(value.sum(), shift)
        assert torch.allclose(gradient, expected, rtol=1e-4)


@pytest.mark.parametrize("solver", [Anderson(memory=2), Anderson(memory=2, damping=0.8, least_squares="qr")], ids=str)
def test_torch_func_transforms_of_the_steps(solver):
    """vmap, grad and forward mode of an unrolled solve, alone and nested, against plain autograd."""
    x, w = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64) / 4

    def value(x, w):
        return solve(lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x), solver, max_steps=6, **FIXED).value

    def loss(x, w):
        return value(x, w).sin().sum()

    leaf = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x, leaf), leaf)
    assert torch.allclose(grad(loss, argnums=1)(x, w), expected)
    assert torch.allclose(jvp(lambda w: loss(x, w), (w,), (w.cos(),))[1], (expected * w.cos()).sum())
    several = torch.stack((w, w / 2, -w))
    assert torch.allclose(vmap(value, in_dims=(None, 0))(x, several), torch.stack([value(x, each) for each in several]))
    gradients = vmap(grad(loss, argnums=1), in_dims=(None, 0))(x, several)
    assert torch.allclose(gradients[0], expected)


@pytest.mark.parametrize("safeguard", [True, False])
def test_compiles_to_one_graph(safeguard):
    x, w = torch.randn(4, 3), torch.randn(3, 3) / 4
    solver = Anderson(memory=2, safeguard=safeguard)

    def run(x):
        return solve(lambda z: torch.tanh(z @ w.T + x), torch.zeros_like(x), solver, max_steps=6, **FIXED).value

    with torch.no_grad():
        assert torch.allclose(torch.compile(run, fullgraph=True, backend="eager")(x), run(x))
