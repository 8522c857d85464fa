"""Projections and proximal operators: derivatives, idempotence, and the conditions that define them."""

import functools

import pytest
import torch

from implicit.optima import (
    project_affine,
    project_ball,
    project_box,
    project_halfspace,
    project_hyperplane,
    project_l1_ball,
    project_simplex,
    projected_gradient,
    prox_elastic_net,
    prox_group_lasso,
    prox_l1,
    prox_squared_l2,
    proximal_gradient,
    stationary,
)

pytestmark = pytest.mark.usefixtures("double")

NORMAL = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
A, B = torch.tensor([[1.0, 1, 0, 2], [0, 1, -1, 1]]).double(), torch.tensor([0.4, -0.7]).double()

# Each with a test of membership.
PROJECTIONS = {
    "box": (functools.partial(project_box, low=-0.5, high=0.25), lambda z: ((z >= -0.5) & (z <= 0.25)).all(-1)),
    "nonnegative": (functools.partial(project_box, low=0.0), lambda z: (z >= 0).all(-1)),
    "simplex": (project_simplex, lambda z: ((z >= 0).all(-1)) & ((z.sum(-1) - 1).abs() < 1e-12)),
    "simplex 3": (functools.partial(project_simplex, total=3.0), lambda z: (z.sum(-1) - 3).abs() < 1e-12),
    "ball": (project_ball, lambda z: z.norm(dim=-1) <= 1 + 1e-12),
    "l1 ball": (project_l1_ball, lambda z: z.abs().sum(-1) <= 1 + 1e-12),
    "hyperplane": (
        functools.partial(project_hyperplane, normal=NORMAL, offset=0.3),
        lambda z: (z @ NORMAL - 0.3).abs() < 1e-12,
    ),
    "halfspace": (
        functools.partial(project_halfspace, normal=NORMAL, offset=-1.0),
        lambda z: z @ NORMAL <= -1 + 1e-12,
    ),
    "affine": (functools.partial(project_affine, a=A, b=B), lambda z: (z @ A.T - B).abs().amax(-1) < 1e-12),
}

# Each with its function g, without the strength 0.4.
PROXES = {
    "l1": (lambda x: prox_l1(x, 0.4), lambda z: z.abs().sum(-1)),
    "elastic net": (
        lambda x: prox_elastic_net(x, 0.4, 1.5),
        lambda z: z.abs().sum(-1) + 0.75 * z.square().sum(-1),
    ),
    "squared l2": (lambda x: prox_squared_l2(x, 0.4), lambda z: z.square().sum(-1) / 2),
    "group": (lambda x: prox_group_lasso(x, 0.4), lambda z: z.norm(dim=-1)),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections(name):
    """In the set, idempotent, and nearer than any other point of the set that is found (the variational inequality)."""
    projection, contains = PROJECTIONS[name]
    x = torch.randn(50, 4)
    z = projection(x)
    assert contains(z).all()
    assert torch.allclose(projection(z), z, atol=1e-12)
    others = projection(5 * torch.randn(50, 4))
    assert (((x - z).unsqueeze(1) * (others - z.unsqueeze(1))).sum(-1) <= 1e-10).all()
    assert torch.equal(projection(x[3]), z[3])


@pytest.mark.parametrize("name", PROXES)
def test_proxes(name):
    """No point that is found has a smaller |z - x|^2 / 2 + t g(z)."""
    prox, g = PROXES[name]
    x = torch.cat((torch.randn(50, 4), 0.05 * torch.randn(20, 4)))
    z = prox(x)

    def value(z):
        return (z - x).square().sum(-1) / 2 + 0.4 * g(z)

    for size in (1e-3, 0.1, 1.0):
        assert (value(z + size * torch.randn_like(x)) >= value(z) - 1e-12).all()
    assert (value(torch.zeros_like(x)) >= value(z) - 1e-12).all()


@pytest.mark.parametrize("name", [*PROJECTIONS, *PROXES])
def test_derivatives(name):
    function = (PROJECTIONS | PROXES)[name][0]
    x = torch.randn(6, 4, requires_grad=True)
    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x)
    assert torch.equal(torch.func.vmap(function)(x), function(x))
    zero = torch.zeros(1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(zero).sum(), zero)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: project_simplex(x, t),
        lambda x, t: project_ball(x, t / 4),
        lambda x, t: project_l1_ball(x, t / 4),
        lambda x, t: project_hyperplane(x, NORMAL, t),
        lambda x, t: project_halfspace(x, NORMAL, -t),
        lambda x, t: project_affine(x, A, B * t.unsqueeze(-1)),
        lambda x, t: prox_group_lasso(x, t / 4),
        lambda x, t: prox_l1(x, t.unsqueeze(-1) / 4),
        lambda x, t: prox_elastic_net(x, t.unsqueeze(-1) / 4, t.unsqueeze(-1)),
        lambda x, t: project_box(x, -t.unsqueeze(-1) / 4, t.unsqueeze(-1) / 4),
    ],
)
def test_derivatives_to_the_set(function):
    x, t = torch.randn(6, 4, requires_grad=True), (1 + torch.rand(6)).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, t), check_forward_ad=True)


def test_conditions_do_not_depend_on_the_step():
    x = torch.tensor([0.9, 0.5, -2.0])

    def distance(z, x):
        return ((z - x) ** 2).sum() / 2

    solution = project_simplex(x)
    for step in (0.01, 1.0):
        assert torch.allclose(projected_gradient(distance, project_simplex, step)(solution, x), solution)
        lasso = proximal_gradient(distance, lambda v, step, x: prox_l1(v, 0.5 * step), step)
        assert torch.allclose(lasso(prox_l1(x, 0.5), x), prox_l1(x, 0.5))
    state = {"a": x, "b": 2 * x}
    found = stationary(lambda z, c: c * (z["a"] ** 2).sum() + (z["b"] ** 3).sum(dim=0, keepdim=True))(state, 2.0)
    assert torch.allclose(found["a"], 4 * x)
    assert torch.allclose(found["b"], 12 * x**2)


def test_refusals():
    with pytest.raises(ValueError, match="The step must be a number > 0, got 0"):
        proximal_gradient(torch.sum, prox_l1, 0)
    with pytest.raises(TypeError, match="The objective must return a tensor, got a float"):
        stationary(lambda z: 1.0)(torch.ones(2))


@pytest.mark.parametrize("prox", [prox_l1, lambda x, t: prox_elastic_net(x, t, 0.5), prox_group_lasso])
def test_a_strength_of_zero_is_the_identity_also_at_zero(prox):
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]], requires_grad=True)
    z = prox(x, 0.0)
    assert torch.equal(z, x)
    assert torch.equal(torch.autograd.grad(z.sum(), x)[0], torch.ones(2, 2))


def test_at_a_bound_the_derivative_is_that_of_one_side():
    x = torch.tensor([0.0, 1.0, 0.5], requires_grad=True)
    assert torch.autograd.grad(project_box(x, 0.0, 1.0).sum(), x)[0].tolist() == [0.0, 0.0, 1.0]
    assert torch.autograd.grad(project_box(x, 0.5, 0.5).sum(), x)[0].tolist() == [0.0, 0.0, 0.0]


def test_integers_are_refused():
    for project in (project_box, project_simplex, project_ball, project_l1_ball):
        with pytest.raises(TypeError, match="projections need a floating-point tensor, got torch.int64; convert it"):
            project(torch.tensor([3, 1]))
