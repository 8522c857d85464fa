"""Projections of points and onto sets of any size that floating point holds."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from implicit.optima import (
    project_affine,
    project_ball,
    project_halfspace,
    project_hyperplane,
    project_l1_ball,
    project_simplex,
    prox_group_lasso,
)

SIZES = {
    project_simplex: lambda z: z.sum(-1),
    project_ball: lambda z: torch.linalg.vector_norm(z.double(), dim=-1),
    project_l1_ball: lambda z: z.abs().sum(-1),
}
POWERS = st.integers(-30, 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("project", SIZES)
@hypothesis.settings(max_examples=50)
@hypothesis.given(POWERS, POWERS, st.integers(0, 1000))
@hypothesis.example(8, 0, 0)
@hypothesis.example(30, 0, 0)
@hypothesis.example(-30, -30, 0)
def test_projections_are_right_at_all_sizes(project, dtype, power, power_of_set, seed):
    """In the set, idempotent, equivariant to a common scale, and with finite gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 5, generator=generator, dtype=dtype) * 10.0**power
    x[0], x[1, 1:] = x[0, 0], x[1, 0]  # equal entries
    size, eps = 10.0**power_of_set, torch.finfo(dtype).eps
    x.requires_grad_()
    z = project(x, size)
    found = SIZES[project](z)
    assert (found <= size * (1 + 8 * eps)).all()
    if project is project_simplex:
        assert (z >= 0).all()
        assert (found >= size * (1 - 8 * eps)).all()
    else:
        inside = SIZES[project](x.detach()) <= size * (1 - 8 * eps)
        assert torch.equal(z[inside], x[inside])
        assert (found >= size * (1 - 8 * eps))[~inside].all()
    again = project(z.detach(), size)
    torch.testing.assert_close(again, z.detach(), rtol=0, atol=8 * eps * size)
    # By a power of two, which is free of rounding.
    for factor in (2.0**-10, 2.0**10):
        assert torch.equal(project(x * factor, size * factor), z * factor)
    (gradient,) = torch.autograd.grad(z.sin().sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@hypothesis.settings(max_examples=50)
@hypothesis.given(st.integers(-8, 40), st.integers(0, 1000))
def test_a_shift_leaves_the_projection_onto_the_simplex(dtype, power, seed):
    x = torch.randint(-3, 3, (8, 5), generator=torch.Generator().manual_seed(seed)).to(dtype) * 2.0 ** (power - 20)
    shift = 2.0**power  # so that no digit of the sum is lost
    assert torch.equal(project_simplex(x + shift), project_simplex(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@hypothesis.settings(max_examples=50)
@hypothesis.given(POWERS, st.integers(-3, 3), st.integers(0, 1000))
def test_block_soft_thresholding_is_what_the_ball_leaves(dtype, power, ratio, seed):
    """The decomposition of Moreau, at any size."""
    size = 10.0**power
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype) * size * 10.0**ratio
    x.requires_grad_()
    z = prox_group_lasso(x, size)
    expected = x - project_ball(x, size)
    torch.testing.assert_close(z, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(x.detach().abs().max()))
    assert (z[torch.linalg.vector_norm(x.double(), dim=-1) <= size * (1 - 1e-6)] == 0).all()
    (gradient,) = torch.autograd.grad(z.sin().sum(), x)
    assert gradient.isfinite().all()


def test_half_precision():
    """Sums of many numbers overflow there, and are rounded to multiples of more than 1."""
    x = (100 * torch.randn(1000, generator=torch.Generator().manual_seed(0))).half()
    torch.testing.assert_close(project_simplex(x), project_simplex(x.float()).half())
    torch.testing.assert_close(project_l1_ball(x, 5.0), project_l1_ball(x.float(), 5.0).half())
    a = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(
        project_affine(x[:3], a.half(), torch.ones(1).half()), project_affine(x[:3].float(), a, torch.ones(1)).half()
    )


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1.0, 1e25, 1e30])
def test_normals_of_any_size(size):
    x, normal = torch.tensor([1.0, 1.0, 1.0]), size * torch.tensor([1.0, 0.0, 0.0])
    for project in (project_hyperplane, project_halfspace):
        torch.testing.assert_close(project(x, normal, 0.0), torch.tensor([0.0, 1.0, 1.0]))
        torch.testing.assert_close(project(x, normal, 0.5 * size), torch.tensor([0.5, 1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@hypothesis.settings(max_examples=50)
@hypothesis.given(POWERS, st.integers(0, 3), st.integers(0, 1000))
def test_affine_sets_of_any_size_and_angle(dtype, power, flatness, seed):
    """The constraint holds to the accuracy of its condition number, not of the square of that."""
    generator = torch.Generator().manual_seed(seed)
    a, x = (torch.randn(6, *shape, generator=generator, dtype=dtype) for shape in ((2, 4), (4,)))
    a[:, 1] = a[:, 0] + 10.0**-flatness * a[:, 1]
    b, eps = torch.randn(6, 2, generator=generator, dtype=dtype), torch.finfo(dtype).eps
    scale = 10.0**power * torch.tensor([1.0, 1e3], dtype=dtype)
    z = project_affine(x, scale.unsqueeze(1) * a, scale * b)
    condition = torch.linalg.cond(a.double()).max().item()
    exact = project_affine(x.double(), a.double(), b.double())
    size = exact.abs().max().item()
    assert (z.double() - exact).abs().max() <= 100 * eps * condition * (size + 1)
