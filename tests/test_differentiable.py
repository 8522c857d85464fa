"""Derivatives of answers that other code has found, against closed forms and finite differences."""

import functools
import gc
import weakref

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.linear_model import Lasso

from implicit import differentiable, projected_gradient, proximal_gradient, stationary
from implicit.optima import project_affine, project_simplex, prox_l1
from solvers import ConvergenceError, ConvergenceWarning, Status
from solvers.linear import CG

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def data(double):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 5, generator=generator), torch.randn(20, generator=generator)


def ridge_objective(w, x, y, penalty):
    return ((x @ w - y) ** 2).sum() / 2 + penalty * (w**2).sum() / 2


def ridge(x, y, penalty):
    return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)


@differentiable(optimality=stationary(ridge_objective))
def fit_ridge(x, y, penalty):
    design, target, strength = x.numpy(), y.numpy(), float(penalty)
    found = scipy.optimize.minimize(
        lambda w: ((design @ w - target) ** 2).sum() / 2 + strength * (w**2).sum() / 2,
        np.zeros(design.shape[1]),
        jac=lambda w: design.T @ (design @ w - target) + strength * w,
        method="BFGS",
        options={"gtol": 1e-11},
    )
    return torch.as_tensor(found.x)


def gradients(function, *args):
    return torch.autograd.grad(function(*args).sin().sum(), [arg for arg in args if arg.requires_grad])


def test_ridge_of_scipy(data):
    x, y = (t.clone().requires_grad_() for t in data)
    penalty = torch.tensor(0.7, requires_grad=True)
    for found, exact in zip(gradients(fit_ridge, x, y, penalty), gradients(ridge, x, y, penalty), strict=True):
        assert torch.allclose(found, exact, rtol=1e-6, atol=1e-10)


def test_ridge_in_every_mode_and_order(data):
    x, y = data
    penalties = torch.tensor([0.1, 1.0, 10.0])
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        found, exact = (mode(functools.partial(f, x, y))(penalties[1]) for f in (fit_ridge, ridge))
        assert torch.allclose(found, exact, rtol=1e-6)
    # One by one, because PyTorch's second derivative of a linear solve under vmap is wrong.
    every = [torch.func.hessian(lambda p: fit_ridge(x, y, p).sin().sum())(penalty) for penalty in penalties]
    exact = [torch.func.hessian(lambda p: ridge(x, y, p).sin().sum())(penalty) for penalty in penalties]
    assert torch.allclose(torch.stack(every), torch.stack(exact), rtol=1e-6)
    mapped = torch.func.vmap(torch.func.hessian(lambda p: fit_ridge(x, y, p).sin().sum()))(penalties)
    assert torch.allclose(mapped, torch.stack(exact), rtol=1e-6)
    p = penalties[1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: fit_ridge(x, y, p), p, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda p: fit_ridge(x, y, p), p)
    batch = torch.func.vmap(fit_ridge, in_dims=(None, 1, None))(x, torch.stack((y, 2 * y), dim=1), p.detach())
    assert torch.allclose(batch[1], 2 * batch[0], rtol=1e-6)


def test_lasso_of_scikit_learn(data):
    x, y = data
    penalty = torch.tensor(2.0, requires_grad=True)

    @differentiable(
        fixed_point=proximal_gradient(
            lambda w, x, y, penalty: ((x @ w - y) ** 2).sum() / 2,
            lambda w, step, x, y, penalty: prox_l1(w, step * penalty),
            step=0.01,
        )
    )
    def fit(x, y, penalty):
        model = Lasso(alpha=float(penalty) / len(y), fit_intercept=False, tol=1e-14, max_iter=10**6)
        return torch.as_tensor(model.fit(x.numpy(), y.numpy()).coef_)

    w = fit(x, y, penalty)
    active = (w != 0).detach()
    assert 0 < active.sum() < 5
    (gradient,) = torch.autograd.grad((w * torch.arange(5.0)).sum(), penalty)
    # On the active set, x_a' (x_a w - y) + penalty * sign(w) = 0.
    chosen = x[:, active]
    slope = torch.linalg.solve(chosen.T @ chosen, -w[active].sign().detach())
    assert torch.allclose(gradient, (slope * torch.arange(5.0)[active]).sum(), rtol=1e-6)


def test_multiclass_logistic_regression_by_lbfgs(data):
    x, _ = data
    labels = torch.arange(20) % 3
    penalty = torch.tensor(0.5, requires_grad=True)

    def objective(w, x, labels, penalty):
        return torch.nn.functional.cross_entropy(x @ w, labels, reduction="sum") + penalty * (w**2).sum() / 2

    @differentiable(optimality=stationary(objective), linear_solver="cg")
    def fit(x, labels, penalty):
        w = torch.zeros(5, 3, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16,
                                      line_search_fn="strong_wolfe")  # fmt: skip

        def closure():
            optimizer.zero_grad()
            loss = objective(w, x, labels, penalty)
            loss.backward()
            return loss

        optimizer.step(closure)
        return w

    weights = torch.randn(5, 3)
    (gradient,) = torch.autograd.grad((fit(x, labels, penalty) * weights).sum(), penalty)
    # The penalty's share of the condition is w, so that w moves by -H^-1 w.
    w = fit(x, labels, penalty).detach()
    hessian = torch.autograd.functional.hessian(lambda w: objective(w, x, labels, penalty.detach()), w).view(15, 15)
    assert torch.allclose(gradient, -weights.flatten() @ torch.linalg.solve(hessian, w.flatten()), rtol=1e-6)


def test_quadratic_program_by_its_kkt_conditions():
    """Minimize z'Qz/2 + c'z subject to Az = b and Gz <= h, as conditions on (z, multipliers)."""
    generator = torch.Generator().manual_seed(1)
    root_q = torch.randn(4, 4, generator=generator)
    c, a, b = torch.randn(4, generator=generator), torch.ones(1, 4), torch.tensor([1.0])
    g, h = -torch.eye(4), torch.zeros(4)

    def kkt(state, root_q, c, b, h):
        z, equality, inequality = state
        q = root_q @ root_q.T + torch.eye(4)
        return (
            q @ z + c + a.T @ equality + g.T @ inequality,
            a @ z - b,
            inequality * (g @ z - h),
        )

    @differentiable(optimality=kkt)
    def solve_qp(root_q, c, b, h):
        q = (root_q @ root_q.T + torch.eye(4)).numpy()
        # By trying every active set.
        for code in range(16):
            active = [i for i in range(4) if code >> i & 1]
            rows = np.concatenate((a.numpy(), g.numpy()[active]))
            right = np.concatenate((b.numpy(), h.numpy()[active]))
            system = np.block([[q, rows.T], [rows, np.zeros((len(rows), len(rows)))]])
            if np.linalg.matrix_rank(system) < len(system):
                continue
            found = np.linalg.solve(system, np.concatenate((-c.numpy(), right)))
            z, multipliers = found[:4], np.zeros(4)
            multipliers[active] = found[5:]
            if (g.numpy() @ z <= h.numpy() + 1e-12).all() and (multipliers >= 0).all():
                return tuple(map(torch.as_tensor, (z, found[4:5], multipliers)))
        raise AssertionError("no active set fits")

    tensors = [t.requires_grad_() for t in (root_q, c, b, h)]
    assert (solve_qp(*tensors)[2] > 0).any()
    assert torch.autograd.gradcheck(lambda *t: solve_qp(*t)[0], tensors)


def test_projections_as_answers():
    x = torch.tensor([0.9, 0.5, -2.0], requires_grad=True)
    a, b = torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([0.3])
    for projection in (project_simplex, lambda v: project_affine(v, a, b)):
        answer = differentiable(
            fixed_point=projected_gradient(lambda z, x: ((z - x) ** 2).sum() / 2, projection, step=0.5)
        )(lambda x, projection=projection: projection(x))
        found = torch.autograd.functional.jacobian(answer, x)
        assert torch.allclose(found, torch.autograd.functional.jacobian(projection, x))


def test_independent_samples_pytrees_and_closures():
    scale = torch.tensor(2.0, requires_grad=True)

    @differentiable(optimality=lambda z, x: {"r": scale * z["r"] ** 2 - x}, batch_dims=1, on_failure="raise")
    def root(x):
        return {"r": (x / scale.detach()).sqrt()}

    x = torch.tensor([1.0, 4.0, 9.0], requires_grad=True)
    total = root(x)["r"].sum()
    expected = (x / scale).sqrt().sum()
    for pair in zip(torch.autograd.grad(total, (x, scale)), torch.autograd.grad(expected, (x, scale)), strict=True):
        assert torch.allclose(*pair)
    with pytest.raises(RuntimeError, match="not among the arguments of .*root"):
        torch.func.grad(lambda x: root(x)["r"].sum())(x.detach())


def test_pytrees_under_transforms():
    @differentiable(optimality=lambda z, x: (z[0] ** 2 - x["a"], z[1] - 2 * x["b"]))
    def answer(x):
        return x["a"].sqrt(), 2 * x["b"]

    def total(x):
        first, second = answer(x)
        return (first * second.sum()).sum()

    x = {"a": torch.tensor([4.0, 9.0]), "b": torch.tensor([1.0])}
    found = torch.func.grad(total)(x)
    assert torch.allclose(found["a"], 2 / (2 * x["a"].sqrt()))
    assert torch.allclose(found["b"], torch.tensor([10.0]))
    mapped = torch.func.vmap(torch.func.grad(total))({k: torch.stack((v, v)) for k, v in x.items()})
    assert torch.allclose(mapped["a"][1], found["a"])


def test_arguments_of_the_function_alone():
    calls = []

    @differentiable(optimality=lambda z, x, scale: z**2 - scale * x)
    def root(x, scale=1.0, max_iter=10, *, verbose=False):
        calls.append((scale, max_iter, verbose))
        return (scale * x).sqrt()

    x = torch.tensor([4.0], requires_grad=True)
    assert torch.allclose(torch.autograd.grad(root(x, max_iter=3, verbose=True), x)[0], torch.tensor([0.25]))
    assert torch.allclose(torch.autograd.grad(root(x=x, scale=4.0), x)[0], torch.tensor([0.5]))
    assert calls == [(1.0, 3, True), (4.0, 10, False)]
    with pytest.raises(TypeError, match="root is called with a tensor of shape .* does not take that argument"):
        root(x, 1.0, x)
    assert root.__name__ == "root"


def test_answer_that_is_none(data):
    x, y = data
    wrong = differentiable(optimality=stationary(ridge_objective))(lambda x, y, penalty: torch.ones(5))
    with pytest.warns(
        ConvergenceWarning, match="(?s)answer of .*lambda.* does not satisfy optimality=stationary.*for 1"
    ):
        wrong(x, y, torch.tensor(1.0))
    # Also where the wrong answer is found by the condition of another problem.
    other = differentiable(optimality=stationary(ridge_objective), on_failure="raise")(
        lambda x, y, penalty: ridge(x, y, 2 * penalty)
    )
    with pytest.raises(ConvergenceError, match="NOT_A_SOLUTION") as caught:
        other(x, y, torch.tensor(1.0))
    assert caught.value.solution.status.item() == Status.NOT_A_SOLUTION
    with pytest.raises(ConvergenceError):
        torch.func.grad(lambda p: other(x, y, p).sum())(torch.tensor(1.0))
    ignored = differentiable(optimality=lambda z, x: z - x, on_failure="ignore")(lambda x: x + 1)
    assert ignored(torch.ones(2)).tolist() == [2.0, 2.0]
    loose = differentiable(optimality=lambda z, x: 1e9 * (z - x), on_failure="raise", rtol=0.1)(lambda x: 1.05 * x)
    loose(torch.ones(2))


def test_check_does_not_depend_on_units(data):
    x, y = data
    for units in (1e-9, 1.0, 1e9):
        for error, good in ((1e-6, True), (1e-2, False)):
            answer = differentiable(
                optimality=lambda w, x, y, units=units: units * (x.T @ (x @ w - y)), on_failure="raise"
            )(lambda x, y, error=error: (1 + error) * torch.linalg.lstsq(x, y.unsqueeze(1)).solution.squeeze(1))
            if good:
                answer(x, y)
            else:
                with pytest.raises(ConvergenceError):
                    answer(x, y)


def test_singular_and_mixing_conditions():
    x = torch.ones(2, requires_grad=True)
    singular = differentiable(optimality=lambda z, x: (z.sum() - x.sum()).expand(2))(lambda x: x.clone())
    with pytest.warns(ConvergenceWarning, match="(?s)linear solve of the derivative of .*BREAKDOWN"):
        singular(x)[0].backward()
    mixing = differentiable(optimality=lambda z, x: z + 2 * z.roll(1) - x, batch_dims=1)(
        lambda x: torch.linalg.solve(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), x)
    )
    with pytest.warns(ConvergenceWarning, match="(?s)mixes samples.*batch_dims=0"):
        mixing(x)[0].backward()


# PyTorch's own, while it compiles.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_inside_torch_compile():
    """Such a call stays out of the graphs around it."""
    answer = differentiable(optimality=lambda z, x: z**2 - x)(torch.sqrt)
    scale = torch.full((2,), 2.0, requires_grad=True)

    def function(x):
        return answer(scale * x).sum() * 3

    compiled = torch.compile(function, backend="aot_eager")
    x = torch.tensor([2.0, 8.0])
    (expected,), (found,) = (torch.autograd.grad(f(x), scale) for f in (function, compiled))
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), function(x))


def test_refusals():
    with pytest.raises(TypeError, match="needs one condition"):
        differentiable()
    with pytest.raises(TypeError, match="needs one condition"):
        differentiable(optimality=torch.cos, fixed_point=torch.cos)
    with pytest.raises(TypeError, match="must return a tensor or a pytree of tensors, got ndarray"):
        differentiable(optimality=lambda z, x: z - x)(lambda x: x.numpy())(torch.ones(2))
    with pytest.raises(ValueError, match="optimality=.*must return the shape of the state"):
        differentiable(optimality=lambda z, x: z.sum())(lambda x: x)(torch.ones(2))
    with pytest.raises(ValueError, match="rtol=...\\) must be a number >= 0, got -1"):
        differentiable(optimality=torch.cos, rtol=-1)
    with pytest.raises(TypeError, match="differentiable has no option 'solve'. It is linear_solver"):
        differentiable(optimality=torch.cos, solve="cg")


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_preconditioners_get_what_they_are_written_for(batch_dims):
    scale, x = torch.linspace(1, 9, 40), torch.ones(3, 40)[0 if batch_dims == 0 else slice(None)]
    solved = differentiable(
        optimality=lambda z, x: {"a": scale * z["a"] - x, "b": 2 * z["b"] - x},
        linear_solver=CG(preconditioner=lambda r: {"a": r["a"] / scale, "b": r["b"] / 2}),
        batch_dims=batch_dims,
    )(lambda x: {"a": x / scale, "b": x / 2})

    def total(x):
        return sum(leaf.sum() for leaf in solved(x).values())

    expected = (1 / scale + 0.5).expand_as(x)
    torch.testing.assert_close(torch.func.grad(total)(x), expected)
    torch.testing.assert_close(torch.func.jvp(total, (x,), (x,))[1], expected.sum())
    pair = torch.stack((x, 2 * x))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(pair), expected.expand_as(pair))


@pytest.mark.parametrize("transform", [torch.autograd.functional.jacobian, lambda f, x: torch.func.jacrev(f)(x)])
def test_answers_that_are_written_into_the_same_memory(transform):
    buffer = np.zeros(2)

    @differentiable(optimality=lambda z, x: z**2 - x)
    def root(x):
        buffer[:] = np.sqrt(x.numpy())
        return torch.from_numpy(buffer)

    def first(x):
        value = root(x)
        root(4 * x.detach() + 1)
        return value

    x = torch.tensor([1.0, 4.0])
    torch.testing.assert_close(transform(first, x), torch.diag(0.5 / x.sqrt()))


def test_grad_mode_and_memory():
    @differentiable(optimality=lambda z, x: z**2 - x)
    def root(x):
        return x.sqrt()

    x = torch.full((3,), 4.0, requires_grad=True)
    with torch.no_grad():
        assert not root(x).requires_grad
    inner = 2 * x
    seen = weakref.ref(inner)
    root(inner).sum().backward()
    del inner
    gc.collect()
    assert seen() is None
    assert torch.allclose(x.grad, torch.full((3,), 1 / 8**0.5))
