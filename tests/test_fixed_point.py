"""Gradients through fixed_point and FixedPointLayer, against dense linear algebra and finite differences."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from implicit import FixedPointLayer, Implicit, Unrolled, fixed_point, get_backward, record_solutions, root
from solvers import Anderson, Broyden, ConvergenceError, ConvergenceWarning, Picard, Status
from solvers.linear import GMRES

SOLVERS = {"picard": Picard(), "anderson": Anderson(), "broyden": Broyden()}
BACKWARDS = {"unrolled": Unrolled(), "implicit": Implicit(linear_solver=GMRES(rtol=1e-13))}
TIGHT = {"rtol": 1e-14, "atol": 1e-14, "max_steps": 200, "on_failure": "ignore"}

all_solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
all_backwards = pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS.keys())


pytestmark = pytest.mark.usefixtures("double")


class TanhMap(nn.Module):
    """tanh(A z + B x), a contraction."""

    def __init__(self, size=3, inputs=3):
        super().__init__()
        self.a = nn.Linear(size, size)
        self.b = nn.Linear(inputs, size, bias=False)
        with torch.no_grad():
            self.a.weight.mul_(0.6 / torch.linalg.matrix_norm(self.a.weight, 2))

    def forward(self, z, x):
        return torch.tanh(self.a(z) + self.b(x))


def tanh_map(z, x, w):
    return torch.tanh(z @ w.T + x)


def dense_gradients(f, z, inputs, cotangent):
    """(df/dt)' (I - df/dz)^-T w per input t, with dense Jacobians, for one problem."""
    jacobian = torch.autograd.functional.jacobian(lambda z: f(z, *inputs), z).reshape(z.numel(), z.numel())
    u = torch.linalg.solve((torch.eye(z.numel()) - jacobian).T, cotangent.flatten()).view_as(z)
    return torch.autograd.grad(f(z, *inputs), inputs, u)


@all_backwards
@all_solvers
def test_matches_the_dense_implicit_gradient(solver, backward):
    x = torch.randn(4, 3, requires_grad=True)
    w = (torch.randn(3, 3) / 4).requires_grad_()
    cotangent = torch.randn(4, 3)
    z = fixed_point(tanh_map, torch.zeros(4, 3), x, w, solver=solver, backward=backward, **TIGHT)
    found = torch.autograd.grad(z, (x, w), cotangent)
    expected = dense_gradients(tanh_map, z.detach(), (x, w), cotangent)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("training", [True, False])
@all_backwards
@all_solvers
def test_gradcheck(solver, backward, training):
    """To inputs and to the module's parameters, in train and in eval mode."""
    layer = FixedPointLayer(TanhMap(), solver=solver, backward=backward, **TIGHT).train(training)
    x = torch.randn(2, 3, requires_grad=True)
    assert gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    if isinstance(backward, Implicit):
        assert gradgradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@all_backwards
def test_pytree_state_and_arguments(backward):
    def f(z, inputs):
        return {"a": 0.3 * torch.sin(z["b"]) @ inputs["w"], "b": 0.4 * torch.cos(z["a"]) + inputs["x"][0] * inputs["k"]}

    x = torch.randn(3, 2, requires_grad=True)
    w = torch.randn(2, 2, requires_grad=True)

    def run(x, w):
        z0 = {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)}
        z = fixed_point(f, z0, {"w": w, "x": [x], "k": 2}, backward=backward, **TIGHT)
        return z["a"], z["b"]

    assert gradcheck(run, (x, w))


def test_closures_over_leaves_and_results():
    """Tensors that the map closes over get gradients, of first and second order."""
    w = (torch.randn(3, 3) / 4).requires_grad_()
    x = torch.randn(2, 3, requires_grad=True)
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.mul_(0.5)

    def leaf(x, w):
        return fixed_point(
            lambda z, x: torch.tanh(z @ w.T + x), torch.zeros(2, 3), x, backward=BACKWARDS["implicit"], **TIGHT
        )

    def result(x, w):
        inner, shifted = w.sin() / 2, x * 2
        f = lambda z, x: torch.tanh(z @ inner.T + x * shifted)  # noqa: E731
        return fixed_point(f, torch.zeros(2, 3), x, backward=BACKWARDS["implicit"], **TIGHT)

    def module(x, *_):
        f = lambda z, x: torch.tanh(layer(z) + x)  # noqa: E731
        return fixed_point(f, torch.zeros(2, 3), x, backward=BACKWARDS["implicit"], **TIGHT)

    for run, inputs in ((leaf, (x, w)), (result, (x, w)), (module, (x, *layer.parameters()))):
        assert gradcheck(run, inputs)
        assert gradgradcheck(run, inputs)


def test_calls_of_the_map():
    """The search for captured tensors shares the solver's first call; the backward pass calls the map once."""
    calls = 0

    def f(z, x):
        nonlocal calls
        calls += 1
        return 0.5 * torch.sin(z) + x

    x = torch.randn(5, 2, requires_grad=True)
    z, solution = fixed_point(f, torch.zeros(5, 2), x, solver="picard", return_solution=True)
    assert calls == solution.num_evals
    z.sum().backward()
    assert calls == solution.num_evals + 1


def test_adjoint_is_reported():
    layer = FixedPointLayer(TanhMap())
    x = torch.randn(5, 3, requires_grad=True)
    z, solution = layer(x, return_solution=True)
    assert solution.adjoint is None
    z.sum().backward()
    assert solution.adjoint.converged.all()
    assert solution.adjoint.residual.max() < 1e-5
    assert solution.adjoint.num_steps.max() <= 15


def test_failed_adjoint_warns_or_raises():
    x = torch.randn(5, 8, requires_grad=True)
    f = TanhMap(8, 8)
    few = Implicit(linear_solver=GMRES(max_steps=1, rtol=1e-12))
    z = FixedPointLayer(f, backward=few)(x)
    with pytest.warns(ConvergenceWarning, match="linear solve of the derivative did not converge"):
        z.sum().backward()
    z = FixedPointLayer(f, backward=few, on_failure="raise")(x)
    with pytest.raises(ConvergenceError, match="linear solve of the derivative"):
        z.sum().backward()


def test_gradient_is_that_of_samples_alone():
    """A sample that fails, forward and backward, leaves the gradients of the others as they are."""
    x = torch.randn(4, 3)
    x[1] = torch.nan
    x.requires_grad_()
    z = fixed_point(lambda z, x: 0.5 * torch.sin(z) + x, torch.zeros(4, 3), x, on_failure="ignore", rtol=1e-12)
    z.sum().backward()
    good = [0, 2, 3]
    assert torch.allclose(x.grad[good], 1 / (1 - 0.5 * torch.cos(z[good])), rtol=1e-5)
    assert x.grad[1].isnan().all()


def test_one_bad_sample_in_f_does_not_hide(recwarn):
    x = torch.tensor([[0.3], [torch.nan]], requires_grad=True)
    fixed_point(lambda z, x: 0.5 * torch.sin(z) + x, torch.zeros(2, 1), x).sum().backward()
    assert any("NONFINITE" in str(w.message) for w in recwarn)


@all_backwards
def test_two_uses_before_one_backward(backward):
    layer = FixedPointLayer(TanhMap(), backward=backward, **TIGHT)
    x, y = torch.randn(2, 4, 3)
    (layer(x).sum() + layer(layer(y)).square().sum()).backward()
    together = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x).sum().backward()
    layer(layer(y)).square().sum().backward()
    for p, expected in zip(layer.parameters(), together, strict=True):
        assert torch.allclose(p.grad, expected, rtol=1e-9)


@all_backwards
def test_backward_twice_through_one_graph(backward):
    layer = FixedPointLayer(TanhMap(), backward=backward, **TIGHT)
    x = torch.randn(4, 3, requires_grad=True)
    z = layer(x)
    first = torch.autograd.grad(z.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(z.sum(), x)[0], first)


@all_backwards
def test_deepcopy_pickle_and_state_dict(backward):
    layer = FixedPointLayer(TanhMap(), solver="broyden", backward=backward, rtol=1e-8)
    x = torch.randn(4, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.f.a.weight is not layer.f.a.weight
    fresh = FixedPointLayer(TanhMap(), solver="broyden", backward=backward, rtol=1e-8)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert list(layer.state_dict()) == ["f.a.weight", "f.a.bias", "f.b.weight"]


def test_gradients_depend_on_grad_mode_alone():
    layer = FixedPointLayer(TanhMap()).eval()
    x = torch.randn(2, 3)
    assert layer(x).requires_grad
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert not layer(x).requires_grad


def test_start():
    layer = FixedPointLayer(TanhMap(4, 3), init=lambda x: x.new_ones(x.shape[0], 4), rtol=1e-8)
    x = torch.randn(2, 3)
    z, cold = layer(x, return_solution=True)
    assert z.shape == (2, 4)
    warm_z, warm = layer(x, z0=z.detach(), return_solution=True)
    assert warm.num_evals == 1 < cold.num_evals
    assert torch.allclose(warm_z, z, rtol=1e-6)
    z0 = torch.zeros(2, 4, requires_grad=True)
    layer(x, z0=z0).sum().backward()
    assert z0.grad is None
    unrolled = FixedPointLayer(TanhMap(), backward="unrolled", solver="picard", rtol=None, atol=None, max_steps=3)
    z0 = torch.zeros(2, 3, requires_grad=True)
    unrolled(x, z0=z0).sum().backward()
    assert z0.grad.abs().sum() > 0


def test_nothing_is_kept_alive():
    layer = FixedPointLayer(TanhMap())
    x = torch.randn(2, 3, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        z, solution = layer(x, return_solution=True)
        watch = weakref.ref(solution)
        z.sum().backward(retain_graph=True)
        del z, solution
        assert watch() is None
    finally:
        gc.enable()


def test_memory_for_backward_does_not_grow_with_the_steps():
    def saved_bytes(backward, steps):
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        layer = FixedPointLayer(TanhMap(), solver="picard", backward=backward, rtol=None, atol=None, max_steps=steps)
        x = torch.randn(50, 3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            z = layer(x)
        total = sum(sizes.values())
        z.sum().backward()
        return total

    assert saved_bytes("implicit", 4) == saved_bytes("implicit", 64)
    assert saved_bytes("unrolled", 64) > 5 * saved_bytes("unrolled", 4)


def test_record_solutions():
    model = nn.Sequential(FixedPointLayer(TanhMap()), FixedPointLayer(TanhMap(), rtol=None, atol=None, max_steps=4))
    x = torch.randn(2, 3)
    with record_solutions(model) as record:
        model(x)
        model(x)
    assert list(record) == ["0", "1"]
    assert [len(solutions) for solutions in record.values()] == [2, 2]
    assert record["0"][0].converged.all()
    assert record["1"][0].history.shape == (4, 2)
    model(x)
    assert len(record["0"]) == 2


def test_repr_shows_what_is_chosen():
    text = repr(FixedPointLayer(TanhMap(), solver=Anderson(memory=3), backward="unrolled", batch_dims=2))
    assert "solver=Anderson(memory=3" in text
    assert "backward=Unrolled()" in text
    assert "batch_dims=2" in text


def test_refusals():
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match="must be given a callable, got 3"):
        FixedPointLayer(3)
    with pytest.raises(TypeError, match=r"got the class TanhMap. Make an object of it first: TanhMap\("):
        FixedPointLayer(TanhMap)
    with pytest.raises(TypeError, match=r"init=\.\.\.\) must be a callable .* got 3"):
        FixedPointLayer(TanhMap(), init=3)
    with pytest.raises(ValueError, match="batch_dims must be an integer >= 0, got -1"):
        FixedPointLayer(TanhMap(), batch_dims=-1)
    with pytest.raises(TypeError, match=r"got the class Anderson. Make an object of it: Anderson\(\)"):
        FixedPointLayer(TanhMap(), solver=Anderson)
    with pytest.raises(ValueError, match="no backward mode 'exact'. The known ones: unrolled, checkpointed, implicit"):
        FixedPointLayer(TanhMap(), backward="exact")
    with pytest.raises(TypeError, match="backward mode must be an implicit.Backward object or a name, got 3"):
        FixedPointLayer(TanhMap(), backward=3)
    with pytest.raises(ValueError, match="no solver 'secant'"):
        FixedPointLayer(TanhMap(), solver="secant")
    with pytest.raises(ValueError, match="max_steps must be a positive integer, got 0"):
        FixedPointLayer(TanhMap(), max_steps=0)
    with pytest.raises(TypeError, match="no option 'solver'. .*Its options: linear_solver"):
        Implicit(solver=GMRES())
    with pytest.raises(TypeError, match="must be a linear solver such as .*got Picard"):
        Implicit(linear_solver=Picard())
    with pytest.raises(ValueError, match=r"Unrolled\(\) needs gradients through the steps .* of NewtonKrylov"):
        FixedPointLayer(TanhMap(), solver="newton_krylov", backward="unrolled")
    with pytest.raises(ValueError, match=r"Unrolled\(\) needs gradients through the steps"):
        fixed_point(torch.cos, x, solver="newton_krylov", backward="unrolled")
    with pytest.raises(TypeError, match="Options go with a name"):
        get_backward(Implicit(), linear_solver=GMRES())
    with pytest.raises(ValueError, match="zeros like the first input, which must be a tensor; got a dict"):
        FixedPointLayer(TanhMap())({"x": x})
    with pytest.raises(ValueError, match="got no input"):
        FixedPointLayer(TanhMap())()
    for backward in BACKWARDS.values():
        with pytest.raises(ValueError, match=r"must return the shape of the state: got \(2, 2\)"):
            FixedPointLayer(lambda z, x: z[:, :2], backward=backward)(x)
        with pytest.raises(ValueError, match="must return the structure of the state"):
            FixedPointLayer(lambda z, x: (z, x), backward=backward)(x)
        with pytest.raises(TypeError, match="got torch.float32 for a state of torch.float64"):
            FixedPointLayer(lambda z, x: x.float(), backward=backward)(x)
        with pytest.raises(RuntimeError, match="changed its argument z in place"):
            FixedPointLayer(lambda z, x: z.mul_(0.5) + x, backward=backward)(x)


def test_status_of_each_sample():
    rate = torch.tensor([[0.5], [3.0]])
    z, solution = fixed_point(
        lambda z: rate * z + 1, torch.zeros(2, 1), solver="picard", on_failure="ignore", return_solution=True
    )
    assert [Status(int(s)) for s in solution.status] == [Status.CONVERGED, Status.DIVERGED]
    assert z.isfinite().all()


@pytest.mark.parametrize("backward", ["implicit", "unrolled", "shine"])
def test_parameters_that_are_used_only_near_the_solution(backward):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far, self.idle = (nn.Parameter(torch.tensor(0.5)) for _ in range(3))

        def forward(self, z, x):
            return self.far * torch.sin(z) + x if z.abs().max() > 0 else self.near + x

    layer = FixedPointLayer(Branches(), solver="broyden", backward=backward, rtol=1e-6)
    layer(torch.ones(2, 3)).sum().backward()
    assert layer.f.far.grad is not None
    assert layer.f.far.grad > 0.1
    assert layer.f.idle.grad is None


@pytest.mark.parametrize("in_parts", [{"compact": True}, {"chunk_size": 2}], ids=["compact", "chunks"])
def test_shine_refuses_solves_in_parts(in_parts):
    """The estimate of the inverse is of the samples that the solver had at the end."""
    x = torch.linspace(1, 3, 6).unsqueeze(1).requires_grad_()
    solve_ = root if "chunk_size" in in_parts else fixed_point
    with pytest.raises(ValueError, match=rf"all samples, and with {next(iter(in_parts))}"):
        solve_(lambda z, x: z / (2 + x), torch.ones_like(x), x, solver="broyden", backward="shine", **in_parts)
