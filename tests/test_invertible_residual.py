"""Invertible residual blocks: inverses, log-determinants and their gradients against dense linear algebra."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from imixer import IMLP
from implicit import ExactLogDet, Implicit, InvertibleResidual, PowerSeriesLogDet, spectral_norm
from solvers import ConvergenceError, ConvergenceWarning, Status
from solvers.linear import GMRES

pytestmark = pytest.mark.usefixtures("double")

TIGHT = {"rtol": 1e-13, "atol": 1e-13}
EXACT_GRADIENT = {**TIGHT, "backward": Implicit(linear_solver=GMRES(rtol=1e-13))}


class Network(nn.Module):
    """A contraction of the flattened event: two layers of norm 0.8, and a context that shifts the hidden ones."""

    def __init__(self, size=3, width=6):
        super().__init__()
        self.a, self.b = nn.Linear(size, width), nn.Linear(width, size)
        for layer in (self.a, self.b):
            spectral_norm(layer, coeff=0.8)
            layer.weight = 3 * layer.parametrizations.weight.original

    def forward(self, x, context=0.0):
        return self.b(torch.tanh(self.a(x.reshape(len(x), -1)) + context)).view_as(x)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dense_jacobians(f, x):
    """(B, D, D) of each sample, with a graph."""
    whole = torch.autograd.functional.jacobian(f, x, create_graph=True)
    return torch.stack([whole[i, :, i] for i in range(len(x))])


def truncated_series(jacobian, terms):
    """The first terms of the series for log det(I + J), with exact traces."""
    powers = [torch.linalg.matrix_power(jacobian, k) for k in range(1, terms + 1)]
    traces = [power.diagonal(dim1=-2, dim2=-1).sum(-1) for power in powers]
    return sum((-1) ** (k + 1) * trace / k for k, trace in enumerate(traces, start=1))


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "auto"])
@pytest.mark.parametrize("event", [(3,), (), (2, 2, 1)])
def test_inverse(solver, event):
    block = InvertibleResidual(Network(math.prod(event)), solver=solver, **TIGHT).eval()
    x = torch.randn(5, *event)
    found, solution = block.inverse(block(x), return_solution=True)
    assert (found - x).abs().max() < 1e-10
    assert solution.converged.all()
    assert (block(block.inverse(x)) - x).abs().max() < 1e-10


def test_samples_are_independent_and_batches_have_any_shape():
    block = InvertibleResidual(lambda x: 0.5 * torch.sin(x + x.roll(1, -1)), batch_dims=2, **TIGHT)
    x = torch.randn(2, 3, 4)
    y, log_det = block(x, return_log_det=True)
    assert log_det.shape == (2, 3)
    alone = block(x[1:, 2:], return_log_det=True)
    assert torch.allclose(alone[0], y[1:, 2:])
    assert torch.allclose(alone[1], log_det[1:, 2:])
    assert torch.allclose(block.inverse(y[1:, 2:]), x[1:, 2:], atol=1e-12)
    for estimator in (ExactLogDet(), PowerSeriesLogDet(continuation=0.5)):
        assert block.log_det(x[:0], estimator=estimator).shape == (0, 3)


def test_exact_log_det():
    block, x = InvertibleResidual(Network()).eval(), torch.randn(5, 3)
    y, log_det = block(x, return_log_det=True)
    expected = torch.linalg.slogdet(dense_jacobians(block, x))[1]
    assert torch.allclose(log_det, expected, rtol=1e-12)
    assert torch.allclose(block.log_det(x), expected, rtol=1e-12)
    assert torch.equal(y, block(x))
    variables = list(block.parameters())
    for a, b in zip(
        torch.autograd.grad(log_det.sum(), variables, allow_unused=True),
        torch.autograd.grad(expected.sum(), variables, allow_unused=True),
        strict=True,
    ):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("terms", [1, 2, 5, 12])
def test_truncation_error_is_within_its_bound(terms):
    """An elementwise map has a diagonal Jacobian, on which random signs give exact traces."""
    slope = torch.tensor([0.9, -0.8, 0.5])
    block, x = InvertibleResidual(lambda x: slope * torch.sin(x)), torch.randn(20, 3)
    series = PowerSeriesLogDet(terms=terms)
    error = (block.log_det(x, estimator=series) - block.log_det(x)).abs()
    assert (error <= series.bias_bound(0.9, size=3)).all()
    # Near -q x the bound is sharp, but for a factor of at most 1 / (1 - q).
    block = InvertibleResidual(lambda x: -0.9 * x)
    error = (block.log_det(x, estimator=series) - block.log_det(x)).abs()
    bound = series.bias_bound(0.9, size=3)
    assert (0.1 * bound < error).all()
    assert (error <= bound).all()


def test_series_has_the_mean_of_its_terms():
    """Every sample the same x: independent estimates in one call."""
    network, x = Network().eval(), torch.randn(1, 3)
    jacobian = dense_jacobians(network, x)[0].detach()
    block = InvertibleResidual(network, estimator=PowerSeriesLogDet(terms=3))
    estimates = block.log_det(x.expand(20000, 3), generator=seeded()).detach()
    expected = truncated_series(jacobian, terms=3)
    assert estimates.std() > 0.01
    assert abs(estimates.mean() - expected) < 4 * estimates.std() / 20000**0.5
    # Vectors average.
    several = PowerSeriesLogDet(terms=3, num_samples=16)
    averaged = block.log_det(x.expand(2000, 3), estimator=several, generator=seeded()).detach()
    assert abs(averaged.mean() - expected) < 4 * averaged.std() / 2000**0.5
    assert averaged.std().item() == pytest.approx(estimates.std().item() / 4, rel=0.1)


def test_roulette_is_unbiased():
    block, x = InvertibleResidual(lambda x: -0.6 * torch.sin(x + 0.3 * x.flip(1))), torch.randn(1, 2)
    exact = block.log_det(x)[0]

    def distance(estimator):
        estimates = block.log_det(x.expand(40000, 2), estimator=estimator, generator=seeded())
        return abs(estimates.mean() - exact) / (estimates.std() / 40000**0.5)

    assert distance(PowerSeriesLogDet(terms=1)) > 20
    assert distance(PowerSeriesLogDet(terms=1, continuation=0.6)) < 4


ESTIMATORS = [ExactLogDet(), PowerSeriesLogDet(terms=4, num_samples=2), PowerSeriesLogDet(terms=2, continuation=0.6)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["exact", "series", "roulette"])
def test_gradients_of_the_log_det(estimator):
    """To x, to the context, and to the weights, for random numbers that are held."""
    block = InvertibleResidual(Network(size=2, width=3), estimator=estimator).eval()
    names, values = zip(*block.named_parameters(), strict=True)

    def f(x, context, *values):
        parameters = dict(zip(names, values, strict=True))
        options = {"return_log_det": True, "generator": seeded(1)}
        return functional_call(block, parameters, (x, context), options)

    x, context = torch.randn(2, 2, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    assert gradcheck(f, (x, context, *values))


@pytest.mark.parametrize("backward", [EXACT_GRADIENT["backward"], "unrolled", "checkpointed"])
def test_gradients_of_the_inverse(backward):
    """dx/dy = (I + J)^-1, and by the implicit function theorem dx/dt = -(I + J)^-1 dg/dt."""
    network = Network().eval()
    block = InvertibleResidual(network, backward=backward, solver="picard", **TIGHT)
    y, w = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    context = torch.randn(4, 6, requires_grad=True)
    x = block.inverse(y, context)
    jacobian = dense_jacobians(lambda x: block(x, context), x.detach()).detach()
    u = torch.linalg.solve(jacobian.mT, w)  # (B, D), the incoming gradient through (I + J)^-1
    variables = [context, *network.parameters()]
    found = torch.autograd.grad((x * w).sum(), (y, *variables))
    expected = torch.autograd.grad(network(x.detach(), context), variables, -u)
    for a, b in zip(found, (u, *expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11)


def test_log_det_of_the_inverse():
    """By sampling: x = inverse(y) has the log-density of y plus log_det(x). Its gradient goes through the solve."""
    block = InvertibleResidual(Network(), **EXACT_GRADIENT).eval()
    y = torch.randn(3, 3, requires_grad=True)
    expected = torch.linalg.slogdet(dense_jacobians(block.inverse, y))[1]
    assert torch.allclose(-block.log_det(block.inverse(y)), expected)
    assert gradcheck(lambda y: block.log_det(block.inverse(y)), (y,))


class Negative(nn.Module):
    """-g of an iMLP's block z = y + g(z)."""

    def __init__(self, imlp):
        super().__init__()
        self.imlp = imlp

    def forward(self, z):
        first, second = self.imlp.normalized_layers
        return -second(self.imlp.act(first(self.imlp.act(z))))


def test_imlp_is_the_inverse_of_a_block():
    """The solution (1 - g)^-1 y of an iMLP inverts the block 1 + (-g), in values and in gradients."""
    options = {"solver": "anderson", "rtol": 1e-14, "n_iter": 200}
    imlp = IMLP(5, 4, coeff=0.7, backward=EXACT_GRADIENT["backward"], **options).eval()
    for layer in imlp.normalized_layers:
        layer.weight = 3 * layer.parametrizations.weight.original
    block = InvertibleResidual(Negative(imlp), **EXACT_GRADIENT)
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    found = imlp.fc2(imlp.act(block.inverse(imlp.fc1(x))))
    expected = imlp(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    variables = (x, *imlp.parameters())
    for a, b in zip(
        torch.autograd.grad((found * w).sum(), variables),
        torch.autograd.grad((expected * w).sum(), variables),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-11)


def test_one_map_a_call():
    """Parametrized weights are computed once a call; across calls in training mode torch's own cache holds them."""
    network = Network()
    computed = []
    network.a.parametrizations.weight[0].register_forward_hook(lambda *call: computed.append(call[-1]))
    block, x = InvertibleResidual(network, **TIGHT), torch.randn(4, 3)
    calls = [
        lambda: block(x),
        lambda: block(x, return_log_det=True),
        lambda: block.log_det(x, estimator=PowerSeriesLogDet(terms=3)),
        lambda: block.inverse(x),
        lambda: InvertibleResidual(lambda x: network(x)).inverse(x),
    ]
    for number, call in enumerate(calls, start=1):
        call()
        assert len(computed) == number
    with torch.no_grad():
        network.a.parametrizations.weight.original.add_(torch.randn(6, 3))  # as an optimizer's step would
    with parametrize.cached():
        assert (block.inverse(block(x)) - x).abs().max() < 1e-12
    block.eval()
    assert (block.inverse(block(x)) - x).abs().max() < 1e-12


def test_maps_that_do_not_contract_are_reported():
    x = torch.tensor([[0.1], [3.0]])
    folding = InvertibleResidual(lambda x: 3 * torch.sin(2 * x), solver="picard")
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        _, solution = folding.inverse(x, return_solution=True)
    assert solution.failed.any()
    folding.on_failure = "raise"
    with pytest.raises(ConvergenceError, match="did not converge"):
        folding.inverse(x)
    # Slopes of -1.5 near 0 and of 0 beyond 1.
    for estimator in (ExactLogDet(), PowerSeriesLogDet(terms=1), PowerSeriesLogDet(continuation=0.3)):
        options = {"estimator": estimator, "on_failure": "raise"}
        steep = InvertibleResidual(lambda x: -1.5 * x.clamp(-1, 1), **options)
        with pytest.raises(ConvergenceError, match="shows that g does not contract for 1 of 2 samples") as raised:
            steep.log_det(x)
        assert raised.value.solution.status.tolist() == [Status.DIVERGED, Status.UNTESTED]
        steep.on_failure = "warn"
        with pytest.warns(ConvergenceWarning, match="implicit.spectral_norm") as warned:
            _, log_det = steep(x, return_log_det=True)
        assert warned[0].filename == __file__
        assert log_det[1] == 0
        steep.on_failure = "ignore"
        steep.log_det(x)
    with pytest.raises(ConvergenceError) as raised:
        InvertibleResidual(lambda x: -1.5 * x, batch_dims=2, on_failure="raise").log_det(torch.ones(2, 3, 1))
    assert raised.value.solution.status.shape == (2, 3)


def test_one_bad_sample_marks_itself():
    block = InvertibleResidual(lambda x: 0.5 * torch.sin(x), on_failure="ignore", **TIGHT)
    x = torch.tensor([[1.0, 2.0], [torch.nan, 0.0]])
    y, log_det = block(x, return_log_det=True)
    assert torch.allclose(log_det[0], (1 + 0.5 * x[0].cos()).log().sum())
    assert log_det[1].isnan()
    found, solution = block.inverse(y, return_solution=True)
    assert torch.allclose(found[0], x[0])
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]


@pytest.mark.parametrize("estimator", ESTIMATORS[:2], ids=["exact", "series"])
def test_transforms(estimator):
    block, x = InvertibleResidual(Network(), estimator=estimator).eval(), torch.randn(4, 3)
    parameters = {name: value.detach() for name, value in block.named_parameters()}

    def loss(parameters):
        y, log_det = functional_call(block, parameters, (x,), {"return_log_det": True, "generator": seeded()})
        return y.square().sum() + log_det.sum()

    found = grad(loss)(parameters)
    loss({}).backward()
    for name, value in block.named_parameters():
        assert torch.allclose(found[name], value.grad)
    samples = vmap(lambda x: block.log_det(x[None])[0], randomness="different")(x)
    assert samples.shape == (4,)
    if isinstance(estimator, ExactLogDet):
        assert torch.allclose(samples, block.log_det(x))


def test_transforms_of_the_inverse():
    block, y = InvertibleResidual(Network(), **EXACT_GRADIENT).eval(), torch.randn(4, 3)
    found = vmap(jacrev(lambda y: block.inverse(y[None])[0]))(y)
    assert torch.allclose(found, torch.linalg.inv(dense_jacobians(block, block.inverse(y))))


def test_checkpointing_changes_nothing():
    block = InvertibleResidual(Network(), estimator=PowerSeriesLogDet(terms=3)).eval()
    x = torch.randn(4, 3, requires_grad=True)

    def log_det(x):
        return block.log_det(x, generator=seeded())

    variables = (x, block.g.a.parametrizations.weight.original)
    log_det(x).sum().backward()
    expected = [variable.grad.clone() for variable in variables]
    for variable in variables:
        variable.grad = None
    checkpoint(log_det, x, use_reentrant=True).sum().backward()
    for variable, gradient in zip(variables, expected, strict=True):
        assert torch.equal(variable.grad, gradient)


def test_compiles_to_one_graph():
    steps = {"rtol": None, "atol": None, "max_steps": 6}
    block, x = InvertibleResidual(Network(), solver="picard", backward="unrolled", **steps).eval(), torch.randn(4, 3)
    log_det = torch.compile(block.log_det, fullgraph=True, backend="aot_eager")
    assert torch.allclose(log_det(x), block.log_det(x))
    log_det(x).sum().backward()
    assert block.g.a.parametrizations.weight.original.grad.any()
    inverse = torch.compile(block.inverse, fullgraph=True, backend="aot_eager")
    assert torch.allclose(inverse(x), block.inverse(x))


def test_lower_precision():
    exact, x = Network(), torch.randn(4, 3)
    expected, log_det = InvertibleResidual(exact).eval()(x, return_log_det=True)
    for estimator in (ExactLogDet(), PowerSeriesLogDet(terms=30, num_samples=500)):
        for dtype in (torch.bfloat16, torch.float16):
            block = InvertibleResidual(exact.to(dtype), estimator=estimator).eval()
            found = block(x.to(dtype), return_log_det=True)
            assert [part.dtype for part in found] == [dtype, torch.float32]
            assert torch.allclose(found[0].double(), expected, atol=0.03)
            assert torch.allclose(found[1].double(), log_det, atol=0.05)
            assert torch.allclose(block.inverse(found[0]).double(), x, atol=0.05)
        block = InvertibleResidual(exact.float(), estimator=estimator).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = block(x.float(), return_log_det=True)
            inverse = block.inverse(found[0])
        assert [part.dtype for part in (*found, inverse)] == [torch.float32] * 3
        assert torch.allclose(found[1].double(), log_det, atol=0.05)
        assert torch.allclose(inverse.double(), x, atol=0.05)


def test_refusals():
    block, x = InvertibleResidual(torch.sin), torch.randn(2, 3)
    for call in (block, block.inverse, block.log_det):
        with pytest.raises(TypeError, match="takes one tensor, (.*), got a dict. .* block"):
            call({"a": x})
        with pytest.raises(TypeError, match="must be real and floating-point, got torch.int64"):
            call(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="batch_dims=1 but a state tensor has shape ()"):
            call(torch.tensor(1.0))
    narrow = InvertibleResidual(lambda x: 0.5 * x[:, :1])  # which would broadcast
    for call in (narrow, narrow.inverse, narrow.log_det):
        with pytest.raises(ValueError, match="g must return the shape of the state: got (.*) for a state of shape"):
            call(x)
    in_place = InvertibleResidual(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)))
    for call in (in_place, in_place.inverse):
        with pytest.raises(RuntimeError, match="changed its argument . in place, so .* is lost"):
            call(torch.randn(2, 3))
    with pytest.raises(TypeError, match="must be given a callable, got 3"):
        InvertibleResidual(3)
    with pytest.raises(TypeError, match="estimator must be ExactLogDet.. or PowerSeriesLogDet....., got 'exact'"):
        InvertibleResidual(torch.sin, estimator="exact")
    with pytest.raises(TypeError, match="has no option 'term'. Did you mean 'terms'?"):
        PowerSeriesLogDet(term=3)
    for options in ({"terms": 0}, {"num_samples": 0}, {"continuation": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PowerSeriesLogDet(**options)
    with pytest.raises(ValueError, match="a contraction factor in .*, got 1.0"):
        PowerSeriesLogDet().bias_bound(1.0, size=2)
    with pytest.raises(ValueError, match="max_steps"):
        InvertibleResidual(torch.sin, max_steps=0)
