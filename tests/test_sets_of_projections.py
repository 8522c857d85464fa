"""Sets that are empty or not defined, points that are not finite, and shapes that do not fit."""

import math

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
    prox_elastic_net,
    prox_group_lasso,
    prox_l1,
    prox_squared_l2,
)

# Each with the name of its size, which may not be negative.
SIZED = {
    project_simplex: "total",
    project_ball: "radius",
    project_l1_ball: "radius",
    prox_l1: "strength",
    prox_squared_l2: "strength",
    prox_group_lasso: "strength",
    lambda x, t: prox_elastic_net(x, t, 0.5): "strength",
    lambda x, t: prox_elastic_net(x, 0.5, t): "ridge",
}


@pytest.mark.parametrize("function", SIZED)
@pytest.mark.parametrize("size", [-1, -0.5, math.nan])
def test_negative_numbers_are_refused(function, size):
    with pytest.raises(ValueError, match=rf"{SIZED[function]}=...\) must be a number >= 0, got {size}"):
        function(torch.tensor([0.3, -2.0]), size)


@pytest.mark.parametrize("function", SIZED)
def test_where_a_tensor_is_negative_the_result_is_nan(function):
    """And elsewhere it is that of the number, also under transforms and torch.compile."""
    x = torch.tensor([[0.3, -2.0], [0.3, -2.0]])
    sizes = torch.tensor([-0.5, 0.5])
    per_sample = function(x.unsqueeze(1), sizes.unsqueeze(1))
    if per_sample.shape != (2, 1, 2):  # one size for each entry
        per_sample = function(x.unsqueeze(1), sizes.view(2, 1, 1))
    expected = function(x[1], 0.5)
    assert per_sample[0].isnan().all()
    assert torch.equal(per_sample[1, 0], expected)
    mapped = torch.func.vmap(function)(x, sizes)
    assert mapped[0].isnan().all()
    assert torch.equal(mapped[1], expected)


def test_an_empty_box():
    x = torch.tensor([-1.0, 0.5, 3.0])
    for low, high in ((1.0, 0.0), (0, -1), (math.nan, None), (None, math.nan), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=f"project_box needs numbers low <= high, got low={low} and high={high}"):
            project_box(x, low, high)
    low, high = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 2.0])
    expected = torch.tensor([0.0, math.nan, 2.0])
    assert torch.equal(project_box(x, low, high).isnan(), expected.isnan())
    assert project_box(x, low, 1.0).tolist()[:2] == [0.0, 1.0]
    assert project_box(x, low, 1.0)[2].isnan()
    assert project_box(x, 0.5, high)[1].isnan()
    assert project_box(torch.tensor(math.nan), torch.zeros(()), torch.ones(())).isnan()
    for bounds in ({"low": torch.tensor(math.nan)}, {"high": torch.tensor(math.nan)}):
        assert project_box(x, **bounds).isnan().all()


def test_a_ball_without_end():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(project_ball(x, math.inf).sum(), x)
    assert gradient.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("x", [[math.inf, 1.0], [-math.inf, 0.0], [math.nan, 1.0]], ids=str)
@pytest.mark.parametrize("project", [project_ball, project_l1_ball])
def test_an_infinite_point_has_no_projection(project, x):
    assert project(torch.tensor([x, [0.5, 0.5]])).isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize(
    "project",
    [
        project_simplex,
        project_ball,
        project_l1_ball,
        lambda x: prox_group_lasso(x, 1.0),
        lambda x: project_hyperplane(x, x),
        lambda x: project_halfspace(x, x),
        lambda x: project_affine(x, torch.ones(1, 1), torch.ones(1)),
    ],
)
def test_vectors_have_entries(project, shape):
    with pytest.raises(ValueError, match=r"need an entry; got x of \(.*\). For single numbers, write x.unsqueeze"):
        project(torch.ones(shape))


@pytest.mark.parametrize("project", [project_hyperplane, project_halfspace])
def test_normals(project):
    x = torch.ones(2, 3)
    assert project(x, torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])).isnan().all(-1).tolist() == [True, False]
    for normal in (torch.ones(1), torch.ones(4), torch.ones(())):
        with pytest.raises(ValueError, match=r"The normal needs the last dimension of x, got \(.*\) for x of \(2, 3\)"):
            project(x, normal)


@pytest.mark.parametrize(
    ("a", "b"), [((5, 4), (5,)), ((2, 3), (2,)), ((2, 4), (3,)), ((2, 4), ()), ((4,), (4,))], ids=str
)
def test_shapes_of_equations(a, b):
    with pytest.raises(ValueError, match="project_affine needs x .* with M <= D, got .* leave out those that follow"):
        project_affine(torch.ones(6, 4), torch.ones(a), torch.ones(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(2, 2), (2, 8), (8, 8), (5, 300)], ids=str)
def test_dependent_equations_give_nan(dtype, sizes):
    """Whether they are consistent or not, and though rounding hides that they depend on each other."""
    number, unknowns = sizes
    generator = torch.Generator().manual_seed(0)
    a, x = (torch.randn(20, *shape, generator=generator, dtype=dtype) for shape in (sizes, (unknowns,)))
    a[10:, -1] = (torch.randn(10, 1, number - 1, generator=generator, dtype=dtype) @ a[10:, :-1]).squeeze(1)
    for b in ((a @ torch.ones_like(x).unsqueeze(-1)).squeeze(-1), torch.ones(20, number, dtype=dtype)):
        z = project_affine(x, a, b)
        assert z[:10].isfinite().all()
        assert z[10:].isnan().all()
    assert torch.equal(project_affine(x, a[:, :0], b[:, :0]), x)


def test_in_graphs():
    """The checks of numbers do not break a graph of torch.compile, and those of tensors need no values."""

    @torch.compile(fullgraph=True, backend="eager")
    def all_of_them(x, t, number):
        return project_box(x, 0.0, t) + project_ball(x, number) + prox_squared_l2(x, number)

    x, t = torch.tensor([0.3, 2.0]), torch.tensor(0.5)
    torch.testing.assert_close(all_of_them(x, t, 1.5), all_of_them.__wrapped__(x, t, 1.5))
    meta = x.to("meta")
    assert project_box(meta, t.to("meta"), 1.0).is_meta
    assert project_affine(project_ball(meta, t.to("meta")), meta[None], meta[:1]).is_meta
