"""Every linear solver that tests its residual against dense linear algebra. A new solver is one new row."""

import math

import pytest
import torch

from solvers import ConvergenceWarning, Status
from solvers.linear import (
    CG,
    GMRES,
    AutoLinear,
    BiCGStab,
    Dense,
    NormalCG,
    Richardson,
    get_linear_solver,
    linear_solve,
)

pytestmark = pytest.mark.usefixtures("double")

ROWS = {
    "gmres": GMRES(max_steps=300),
    "gmres preconditioned": GMRES(max_steps=300, preconditioner=lambda x: x / 2),
    "bicgstab": BiCGStab(max_steps=300),
    "bicgstab preconditioned": BiCGStab(max_steps=300, preconditioner=lambda x: x / 2),
    "cg": CG(max_steps=300),
    "cg preconditioned": CG(max_steps=300, preconditioner=lambda x: x / 2),
    "normal_cg": NormalCG(max_steps=1000),
    "dense": Dense(),
    "richardson": Richardson(),
    "auto": AutoLinear(),
    "auto large": AutoLinear(max_unknowns=4),
}
SYMMETRIC = {"cg", "cg preconditioned"}


def systems(name, size=12):
    """(6, size, size) matrices, symmetric positive definite where the solver needs that, and right-hand sides."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(6, size, size, generator=generator) / size
    shift = torch.linspace(1, 3, 6).view(-1, 1, 1) * torch.eye(size)
    a = shift + (noise @ noise.mT if name in SYMMETRIC else noise)
    return a, torch.randn(6, size, generator=generator)


def product(a):
    return lambda x: (a @ x.unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize("name", ROWS)
def test_solves(name):
    a, b = systems(name)
    solution = linear_solve(product(a), b, ROWS[name], on_failure="raise", history=True)
    assert torch.allclose(solution.value, torch.linalg.solve(a, b), rtol=1e-8)
    residual = (b - product(a)(solution.value)).norm(dim=1) / b.norm(dim=1)
    assert torch.allclose(solution.residual, residual, rtol=1e-2, atol=1e-12)
    assert solution.num_evals >= int(solution.num_steps.max())


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("sign", [1.0, -1e-9, 1e9])
def test_units(name, sign):
    """A number in front of the operator changes the answer alone."""
    a, b = systems(name)
    solutions = [linear_solve(product(c * a), b, ROWS[name], on_failure="raise") for c in (1.0, sign)]
    assert torch.allclose(solutions[0].value, sign * solutions[1].value, rtol=1e-7)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_right_hand_sides_whose_squares_vanish_or_overflow(name, dtype):
    """They are solved as others are."""
    a, b = (x.to(dtype) for x in systems(name))
    c = torch.linspace(0.3, 0.95, 6).unsqueeze(1) * -math.log10(torch.finfo(dtype).tiny)
    small, large = 10**-c, 10**c
    for scale in (small, large):
        solution = linear_solve(product(a), (scale * b).to(dtype), ROWS[name], rtol=1e-4, on_failure="ignore")
        residual = scale * b.double() - product(a.double())(solution.value.double())
        relative = (residual / scale).norm(dim=1) / b.norm(dim=1)
        assert (relative < 2e-4).all()
        assert solution.converged.all()


@pytest.mark.parametrize("solver", [GMRES(atol=1e-100), AutoLinear(max_unknowns=4, otherwise=GMRES(atol=1e-100))])
def test_absolute_tolerances_have_the_unit_of_the_right_hand_side(solver):
    a, b = systems("gmres")
    solution = linear_solve(product(a), 1e-101 * b, solver)
    assert (solution.num_steps == 0).all()
    assert solution.converged.all()


@pytest.mark.parametrize("name", ROWS)
def test_infinity_is_no_solution(name):
    a, b = systems(name)
    b[2, 0], b[4] = torch.inf, -torch.inf
    solution = linear_solve(product(a), b, ROWS[name], on_failure="ignore")
    assert solution.status.tolist() == [Status.NONFINITE if i in (2, 4) else Status.CONVERGED for i in range(6)]
    largest = linear_solve(lambda x: torch.finfo(x.dtype).max * x, torch.ones(1, 3), ROWS[name], on_failure="ignore")
    assert not largest.converged.any() or (largest.value > 0).all()


@pytest.mark.parametrize("name", ROWS)
def test_samples_are_independent(name):
    a, b = systems(name)
    together = linear_solve(product(a), b, ROWS[name])
    for i in (0, 5):
        alone = linear_solve(product(a[i : i + 1]), b[i : i + 1], ROWS[name])
        assert torch.allclose(alone.value[0], together.value[i], rtol=1e-9)
    spoiled = torch.where(torch.arange(6).unsqueeze(1) == 2, torch.nan, b)
    beside = linear_solve(product(a), spoiled, ROWS[name], on_failure="ignore")
    assert beside.status[2] == Status.NONFINITE
    assert torch.allclose(beside.value[3:], together.value[3:], rtol=1e-9)


@pytest.mark.parametrize("name", ROWS)
def test_edges(name):
    solver = ROWS[name]
    zero = linear_solve(lambda x: 2 * x, torch.zeros(2, 3), solver)
    assert (zero.value == 0).all()
    assert zero.converged.all()
    assert linear_solve(lambda x: 2 * x, torch.zeros(0, 3), solver).value.shape == (0, 3)
    d = torch.tensor([1.0, 2.0, 0.0])
    singular = linear_solve(
        lambda x: d * x, torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 0, 1]]), solver, on_failure="ignore"
    )
    assert singular.converged.tolist() == [True, False, False]
    assert torch.allclose(singular.value[0], torch.tensor([1.0, 0.5, 0.0]))
    assert set(singular.status[1:].tolist()) <= {Status.BREAKDOWN, Status.STAGNATED}


def test_cg_notices_what_is_not_definite():
    indefinite = torch.diag(torch.tensor([1.0, -1.0]))
    solution = linear_solve(lambda x: x @ indefinite, torch.ones(1, 2), CG(), on_failure="ignore")
    assert solution.status.item() == Status.BREAKDOWN
    negative = linear_solve(lambda x: -2 * x, torch.ones(1, 2), CG(), on_failure="raise")
    assert torch.equal(negative.value, torch.full((1, 2), -0.5))


def test_normal_cg_finds_least_squares_solutions_with_a_given_or_a_derived_transpose():
    a = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    for transpose in (None, lambda x: x @ a):
        solution = linear_solve(
            lambda x: x @ a.T, torch.tensor([[1.0, 1.0]]), NormalCG(), rmatvec=transpose, on_failure="ignore"
        )
        assert torch.allclose(solution.value[0], torch.linalg.pinv(a) @ torch.ones(2))
        assert solution.status.item() == Status.BREAKDOWN


def test_dense_notices_products_that_mix_samples():
    with pytest.warns(ConvergenceWarning, match="STAGNATED"):
        linear_solve(lambda x: x + 2 * x.roll(1, 0), torch.ones(4, 2).cumsum(0), Dense())
    with pytest.raises(ValueError, match="3000 x 3000 for every sample"):
        linear_solve(lambda x: x, torch.ones(1, 3000), Dense())


def test_preconditioner_saves_steps():
    scale = torch.logspace(0, 5, 40)
    for solver in (CG, GMRES, BiCGStab):
        plain, helped = (
            linear_solve(lambda x: scale * x, torch.ones(2, 40), solver(max_steps=500, preconditioner=p))
            for p in (None, lambda x: x / scale)
        )
        assert helped.num_steps.max() <= 2 < plain.num_steps.max()
    tree = linear_solve(
        lambda x: {"a": scale * x["a"]}, {"a": torch.ones(2, 40)}, GMRES(preconditioner=lambda x: {"a": x["a"] / scale})
    )
    assert tree.num_steps.max() == 1


def test_names():
    for name in ("gmres", "cg", "normal_cg", "bicgstab", "dense", "richardson", "neumann", "auto"):
        assert get_linear_solver(name) == get_linear_solver(get_linear_solver(name))
    assert get_linear_solver("gmres", restart=7) == GMRES(restart=7)
    with pytest.raises(ValueError, match="There is no linear solver 'lu'..* The known ones: gmres, cg,"):
        get_linear_solver("lu")
    with pytest.raises(TypeError, match="preconditioner=...\\) must be a function"):
        CG(preconditioner=torch.eye(2))
    with pytest.raises(ValueError, match="NormalCG takes no preconditioner"):
        NormalCG(preconditioner=lambda x: x)


def decaying(generator, condition, size=8):
    """A matrix with these singular values' logarithms evenly spaced, in random bases."""
    u, v = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return u @ torch.diag(torch.logspace(0, -math.log10(condition), size)) @ v


@pytest.mark.parametrize("name", ["bicgstab", "cg", "gmres", "normal_cg"])
def test_a_sample_takes_no_steps_of_others(name):
    """Short cycles and few steps in float32, beside a system that takes all of its own."""
    options = {"gmres": {"restart": 3}}.get(name, {})
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        a = torch.stack([decaying(generator, condition) for condition in (1e2, 1e8)])
        a = (a.mT @ a if name == "cg" else a).float()
        b = torch.randn(2, 8, generator=generator).float()
        solver = get_linear_solver(name, max_steps=24, **options)
        both, alone = (linear_solve(product(a[:n]), b[:n], solver, on_failure="ignore") for n in (2, 1))
        # The sums of a product of several matrices may be rounded in another way.
        assert alone.status[0] == both.status[0] or (alone.residual[0] - both.residual[0]).abs() < 1e-5
        assert both.num_steps.max() <= 24


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dense_notices_matrices_that_are_singular_to_rounding(dtype):
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        size = 3 + seed % 6
        a = torch.randn(size, size - 1, generator=generator) @ torch.randn(size - 1, size, generator=generator)
        x = torch.randn(1, size, generator=generator)
        a, x = (10.0 ** (seed % 7 - 3) * a).to(dtype), x.to(dtype)
        solution = linear_solve(lambda x, a=a: x @ a.T, x @ a.T, Dense(), on_failure="ignore")
        assert solution.converged.all()
        assert solution.value.abs().max() < 100 * x.abs().max()
        off = x @ a.T + torch.linalg.svd(a.double()).U[:, -1].to(dtype) * (x @ a.T).norm()
        assert linear_solve(lambda x, a=a: x @ a.T, off, Dense(), on_failure="ignore").statuses() == ["BREAKDOWN"]


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e10])
def test_dense_claims_no_solution_whose_digits_are_all_lost(condition):
    """In float32 and in any units, beside float64."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        a, size = decaying(generator, condition).float(), 8
        rows, columns = (10.0 ** torch.randint(-3, 4, (size,), generator=generator) for _ in range(2))
        b = rows * torch.randn(1, size, generator=generator)
        a, b = (rows.unsqueeze(1) * a * columns).float(), b.float()
        solution = linear_solve(product(a[None]), b, Dense(), on_failure="ignore")
        exact = torch.linalg.solve(a.double(), b[0].double())
        error = (columns * (solution.value[0] - exact)).norm() / (columns * exact).norm()
        if condition <= 1e4:
            assert solution.converged.all()
        if solution.converged.all():
            assert error < 0.5


def test_dense_takes_a_tolerance_at_its_word():
    a, b = decaying(torch.Generator().manual_seed(0), 1e12), torch.ones(1, 8)
    without, strict = (
        linear_solve(product(a[None]), b, Dense(rtol=rtol), on_failure="ignore") for rtol in (None, 1e-9)
    )
    assert without.statuses() == ["CONVERGED"]
    assert strict.statuses() == ["STAGNATED" if strict.residual > 1e-9 else "CONVERGED"]


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e19, 1e30])
def test_matrices_whose_squares_vanish_or_overflow(size):
    """Dense solves them in float32 as well, and a right-hand side of zero in any case."""
    a = size * torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float32)
    b = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float32)
    solution = linear_solve(lambda x: x @ a.T, b, "dense", on_failure="raise")
    torch.testing.assert_close(solution.value * size, b / 3, rtol=1e-5, atol=0.0)
