"""A derivative is as accurate as its solve, with no other option than the solve's own tolerance."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from implicit import SHINE, FixedPointLayer, Implicit, differentiable, fixed_point
from solvers import ConvergenceWarning, Status, Stopping
from solvers.linear import GMRES, BiCGStab, Richardson, linear_solve

pytestmark = pytest.mark.usefixtures("double")

TIGHT = {"rtol": 1e-13}
all_solvers = pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "auto"])


class Sine(nn.Module):
    def forward(self, z, x):
        return 0.9 * torch.sin(z) + x


@pytest.mark.long
@pytest.mark.parametrize(
    ("solver", "layered"),
    [("picard", True), ("anderson", True), ("broyden", True), ("auto", True), ("anderson", False)],
)
def test_gradcheck_needs_a_tight_tolerance_and_nothing_else(solver, layered):
    x = torch.tensor([[1.3, -0.9], [0.7, -1.2]], requires_grad=True)
    layer = FixedPointLayer(Sine(), solver=solver, **TIGHT)

    def solved(x):
        if layered:
            return layer(x)
        return fixed_point(lambda z, x: 0.9 * torch.sin(z) + x, torch.zeros_like(x), x, solver=solver, **TIGHT)

    assert gradcheck(solved, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(solved, x, check_fwd_over_rev=True, check_batched_grad=True)


def problem(radius, seed=0, size=6, batch=3):
    """z = tanh(A z + x) with A of this norm."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.linalg.qr(torch.randn(size, size, generator=generator))[0] * radius
    return a, torch.randn(batch, size, generator=generator)


@all_solvers
@pytest.mark.parametrize("radius", [0.3, 0.9])
@pytest.mark.parametrize(
    "linear_solver", [Richardson(), GMRES(), BiCGStab(max_steps=200)], ids=lambda s: type(s).__name__
)
def test_gradients_and_second_derivatives_against_dense_linear_algebra(linear_solver, radius, solver):
    a, x = problem(radius)
    a.requires_grad_(), x.requires_grad_()
    options = {"solver": solver, "rtol": 1e-14, "max_steps": 500, "on_failure": "ignore"}
    z = fixed_point(
        lambda z, x, a: torch.tanh(z @ a.T + x),
        torch.zeros(3, 6),
        x,
        a,
        backward=Implicit(linear_solver=linear_solver),
        **options,
    )
    w = torch.linspace(-1, 1, 18).view(3, 6)
    found = torch.autograd.grad(z, (x, a), w, create_graph=True)
    v = (torch.cos(x), torch.sin(a))
    second = torch.autograd.grad(found, (x, a), v)

    exact = z.detach()
    for _ in range(3):  # to the last digits by Newton's method
        t = torch.tanh(exact @ a.T + x).detach()
        jacobian = (1 - t**2).unsqueeze(2) * a.detach()
        exact = exact - torch.linalg.solve(torch.eye(6) - jacobian, exact - t)

    def dense_gradient(x, a):
        # One more step of Newton's method from the solution is differentiable to the first order of the implicit
        # function; another one to the second.
        z = exact
        for _ in range(2):
            t = torch.tanh(z @ a.T + x)
            jacobian = (1 - t**2).unsqueeze(2) * a
            z = z - torch.linalg.solve(torch.eye(6) - jacobian, z - t)
        return torch.autograd.grad(z, (x, a), w, create_graph=True)

    expected = dense_gradient(x, a)
    expected_second = torch.autograd.grad(expected, (x, a), v)
    for b, c in zip((*found, *second), (*expected, *expected_second), strict=True):
        assert (b - c).norm() <= 1e-11 * c.norm()


def adjoint_residual(dtype=torch.float64, **options):
    x = torch.linspace(-1, 2, 16, dtype=dtype).view(2, 8).requires_grad_()
    z, solution = fixed_point(
        lambda z, x: 0.7 * torch.tanh(z).roll(1, 1) + x,
        torch.zeros(2, 8, dtype=dtype),
        x,
        backward=Implicit(linear_solver=options.pop("linear_solver", GMRES())),
        return_solution=True,
        max_steps=options.pop("max_steps", 100),
        on_failure="ignore",
        **options,
    )
    z.sin().sum().backward()
    return float(solution.adjoint.residual.max())


@pytest.mark.parametrize(
    ("options", "bound", "dtype"),
    [
        ({}, 1e-5, torch.float32),
        ({"rtol": 1e-8}, 1e-9, torch.float64),
        ({"stopping": Stopping(rtol=1e-10, atol=0.0)}, 1e-11, torch.float64),
        ({"rtol": None, "atol": 1e-3}, 2e-12, torch.float64),
        ({"rtol": None, "atol": None, "max_steps": 40}, 2e-12, torch.float64),
        ({"rtol": None, "atol": None, "max_steps": 40}, 7e-6, torch.float32),
        ({"rtol": 1e-12}, 32 * 1.2e-7, torch.float32),
    ],
    ids=str,
)
def test_the_tolerance_follows_the_solve(options, bound, dtype):
    assert adjoint_residual(dtype, **options) <= bound


def test_a_tolerance_that_the_user_gives_is_obeyed():
    loose = GMRES(rtol=0.5)
    assert 1e-3 < adjoint_residual(rtol=1e-12, linear_solver=loose) <= 0.5
    assert adjoint_residual(rtol=1e-2, linear_solver=GMRES(rtol=1e-13)) <= 1e-13
    assert adjoint_residual(rtol=1e-2, linear_solver=GMRES(rtol=None, atol=1e-12)) <= 1e-3


def test_tolerances_of_each_leaf():
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    stopping = Stopping(rtol={"a": 1e-3, "b": 1e-11}, atol=0.0)
    x = torch.ones(2, 3, requires_grad=True)

    def f(z, x):
        return {"a": 0.5 * torch.sin(z["a"]) + x, "b": 0.5 * torch.cos(z["b"]) + z["a"].sum(dim=1)}

    z, solution = fixed_point(f, state, x, stopping=stopping, return_solution=True)
    z["b"].sum().backward()
    assert solution.adjoint.residual.max() <= 1e-12


def test_shine_falls_back_to_the_accuracy_of_the_solve():
    a, x = problem(0.8)
    x.requires_grad_()

    def solved(backward):
        z = fixed_point(
            lambda z, x: torch.tanh(z @ a.T + x),
            x,
            x,
            solver="broyden",
            backward=backward,
            rtol=1e-12,
            atol=0.0,
            max_steps=200,
        )
        return torch.autograd.grad(z.sin().sum(), x)[0]

    shine, exact = solved(SHINE(max_residual=0.0)), solved("implicit")
    assert (shine - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
    "solver",
    [GMRES, BiCGStab, Richardson, lambda **o: GMRES(restart=6, **o), lambda **o: Richardson(otherwise=BiCGStab(), **o)],
    ids=["gmres", "bicgstab", "richardson", "restarted gmres", "richardson, bicgstab"],
)
def test_linear_solvers_reach_rounding(solver, scale, dtype):
    """On well-conditioned systems of many kinds and sizes; asked for more than rounding allows they do not complain."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 40, 150):
        noise = torch.randn(6, size, size, generator=generator, dtype=dtype) / size**0.5
        shifts = torch.tensor([1.0, 1.0, 1.0, 3.0, -2.0, 1.0], dtype=dtype)
        sizes = torch.tensor([0.1, 0.3, 0.45, 0.9, 0.5, 0.0], dtype=dtype)
        matrix = sizes.view(-1, 1, 1) * noise + shifts.view(-1, 1, 1) * torch.eye(size, dtype=dtype)
        b = scale * torch.randn(6, size, generator=generator, dtype=dtype)
        for rtol in (45 * torch.finfo(dtype).eps, torch.finfo(dtype).eps / 4):
            solution = linear_solve(
                lambda x, m=matrix: (m @ x.unsqueeze(2)).squeeze(2), b, solver(rtol=rtol), on_failure="raise"
            )
            residual = (b - (matrix @ solution.value.unsqueeze(2)).squeeze(2)).norm(dim=1) / b.norm(dim=1)
            assert residual.max() <= 45 * torch.finfo(dtype).eps


def test_the_default_of_a_linear_solve_by_itself():
    for dtype in (torch.float32, torch.float64):
        d = torch.linspace(1, 3, 30, dtype=dtype)
        for solver in (None, GMRES(), BiCGStab(), Richardson()):
            solution = linear_solve(lambda x, d=d: d * x, torch.ones(2, 30, dtype=dtype), solver)
            assert solution.residual.max() <= torch.finfo(dtype).eps ** 0.75
    loose = linear_solve(lambda x: d * x, torch.ones(2, 30), GMRES(), rtol=0.1)
    assert 1e-3 < loose.residual.max() <= 0.1


@pytest.mark.parametrize("radius", [0.9, 0.999])
def test_rounding_in_a_slow_adjoint_is_no_failure(radius):
    """Where the map contracts slowly, u is large, and u - J' u loses as many digits as u is larger than w."""
    a = torch.diag(torch.tensor([radius, 0.5, 0.1, -0.3]))
    x = torch.ones(2, 4, requires_grad=True)
    z, solution = fixed_point(
        lambda z, x: z @ a.T + x, torch.zeros(2, 4), x, rtol=1e-14, atol=0.0, solver="broyden", return_solution=True
    )
    z.sum().backward()
    assert solution.adjoint is not None
    assert torch.allclose(x.grad, 1 / (1 - a.diagonal()).expand(2, 4), rtol=1e-10)


def test_a_failed_adjoint_is_still_reported():
    x = torch.ones(2, 6, requires_grad=True)
    a = problem(0.9)[0]
    z, solution = fixed_point(
        lambda z, x: torch.tanh(z @ a.T + x),
        torch.zeros(2, 6),
        x,
        backward=Implicit(linear_solver=GMRES(max_steps=2)),
        rtol=1e-10,
        return_solution=True,
    )
    with pytest.warns(ConvergenceWarning, match="linear solve of the derivative"):
        z.sum().backward()
    assert (solution.adjoint.status == Status.MAX_STEPS).all()


@pytest.mark.parametrize("backward", ["implicit", "unrolled", "shine"])
def test_complex_arguments(backward):
    """The state is real; what the map takes beside it may be complex."""

    def f(z, c, x):
        return 0.3 * torch.tanh(z) * c.real + torch.view_as_real(c * c.conj() * torch.exp(0.1j * c)).sum(dim=-1) * x

    c = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    x = torch.randn(2, 3, requires_grad=True)
    mode = SHINE(max_residual=0.0) if backward == "shine" else backward
    options = {"backward": mode, "solver": "broyden" if backward == "shine" else "picard", **TIGHT}

    def solved(c, x):
        return fixed_point(f, torch.zeros(2, 3), c, x, **options)

    assert gradcheck(solved, (c, x), check_forward_ad=backward != "shine")
    if backward == "implicit":
        assert gradgradcheck(solved, (c, x), check_fwd_over_rev=True)
        gradient = torch.func.grad(lambda c: solved(c, x.detach()).sum())(c.detach())
        assert torch.allclose(gradient, torch.autograd.grad(solved(c, x).sum(), c)[0])


def test_answers_with_complex_arguments():
    @differentiable(optimality=lambda z, c: z - c.abs().square() - c.imag)
    def answer(c):
        return c.abs().square() + c.imag

    assert gradcheck(answer, torch.randn(3, dtype=torch.complex128, requires_grad=True), check_forward_ad=True)
