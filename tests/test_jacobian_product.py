"""Newton's products with the Jacobian on maps that do not support forward mode: nothing is lost, no error hidden."""

import contextlib

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from solvers import Auto, Iteration, NewtonKrylov, solve
from solvers.methods.jacobian_product import JacobianProduct
from solvers.methods.method_choice import NEWTON


class SineWithContext(torch.autograd.Function):
    """In the older style, which torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sin(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.cos(ctx.saved_tensors[0])


class Sine(torch.autograd.Function):
    """In the newer style, without a rule for forward mode."""

    @staticmethod
    def forward(x):
        return torch.sin(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.cos(ctx.saved_tensors[0])


class SineOnce(Sine):
    """Differentiable once: twice, torch.func gives zeros without an error."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * torch.cos(ctx.saved_tensors[0])


def attention(z):
    tokens = z.view(-1, 1, 4, 2)
    return scaled_dot_product_attention(tokens, tokens, tokens).reshape(z.shape)


def numpy_sine(z):
    return torch.from_numpy(torch.sin(z).numpy() + 0.0)


FUNCTIONS = {
    "sine": (torch.sin, "forward mode"),
    "attention": (attention, "finite differences"),
    "function": (Sine.apply, "double backward"),
    "function with context": (SineWithContext.apply, "finite differences"),
    "function, once": (SineOnce.apply, "finite differences"),
    "numpy": (numpy_sine, "finite differences"),
}
MODES = {
    "gradients on": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_products(name, dtype):
    function, way = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    z, v, w = (torch.randn(3, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    z[1] *= 1e-3
    v[2] = 0
    exact = torch.stack(
        [
            torch.autograd.functional.jacobian(attention if name == "attention" else torch.sin, row.unsqueeze(0))[
                0, :, 0
            ]
            for row in z
        ]
    )
    z, v, w = z.to(dtype), v.to(dtype), w.to(dtype)
    with torch.no_grad():
        product = JacobianProduct(function, z, function(z), "forward mode")
        rtol = torch.finfo(dtype).eps ** (0.4 if way == "finite differences" else 0.9)
        for x in (v, w, 1e-20 * w, 1e10 * w):
            expected = (exact @ x.double().unsqueeze(2)).squeeze(2)
            error = (product(x).double() - expected).norm(dim=1)
            assert (error <= rtol * expected.norm(dim=1)).all()
        assert product.way == way
        assert product.matrix().dtype == dtype
        assert torch.allclose(product.matrix().double(), exact, atol=rtol)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("solver", [NewtonKrylov(), Auto()], ids=["newton_krylov", "auto"])
def test_solves_maps_without_forward_mode(solver, name, mode):
    """An expanding map, so that Auto comes to Newton's method as well."""
    function, way = FUNCTIONS[name]
    with MODES[mode]():
        generator = torch.Generator().manual_seed(0)
        shift = torch.randn(4, 8, dtype=torch.float64, generator=generator)

        def f(z):
            return z - (z**3 + z + 0.3 * function(z) - shift)

        solution = solve(f, torch.full_like(shift, 1.5), solver, rtol=1e-9, max_steps=100, on_failure="raise")
        assert torch.allclose(f(solution.value), solution.value, atol=1e-6)
    # Under autocast the map counts as coarse, and zeros in the place of a small part of a product are not seen.
    if isinstance(solver, NewtonKrylov) and (name, mode) != ("function, once", "autocast"):
        assert solution.state.way == way


def test_auto_comes_to_newtons_method_without_forward_mode():
    """exp(z) - 2 from 4, with attention of nothing added: a step by Newton's method, and the right answer."""
    z0 = torch.full((2, 8), 4.0, dtype=torch.float64)

    def f(z):
        return torch.exp(z) - 2 + 1e-3 * attention(z)

    iteration = Iteration(f, z0, Auto(), rtol=1e-10, atol=0, max_steps=100)
    came = False
    while not iteration.done:
        iteration.step()
        came = came or bool((iteration.state.choice.method == NEWTON).any())
    assert came
    assert iteration.solution().converged.all()
    assert iteration.state.newton.way == "finite differences"


def test_the_way_is_remembered():
    """The refused ways are tried once in a solve, not in every step."""
    raised = 0

    class Counted(Sine):
        @staticmethod
        def jvp(ctx, tangent):
            nonlocal raised
            raised += 1
            raise NotImplementedError("no forward mode")

    z0 = torch.full((2, 3), 2.0, dtype=torch.float64)
    solution = solve(lambda z: 3 * Counted.apply(z) + 0.1, z0, NewtonKrylov(), rtol=1e-12, on_failure="raise")
    assert int(solution.num_steps.max()) > 3
    assert raised == 1


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, ValueError, KeyError])
@pytest.mark.parametrize("when", range(8))
def test_errors_of_the_map_are_raised(when, error):
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        if calls > when:
            raise error("mine")
        return 3 * torch.sin(z) + 0.1

    with pytest.raises(error, match="mine"):
        solve(f, torch.full((2, 3), 5.0), NewtonKrylov(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("solver", [NewtonKrylov(), Auto()], ids=["newton_krylov", "auto"])
def test_a_state_without_dimensions(solver, dtype):
    """PyTorch computes the derivative of a tensor without dimensions times a number in float64."""
    answers = {
        lambda z: 0.5 * z + 1: 2.0,
        lambda z: 2 * torch.tanh(z): 1.9150080481545,
        lambda z: z - (z * z - 2): 2**0.5,
    }
    for f, answer in answers.items():
        solution = solve(f, torch.tensor(1.0, dtype=dtype), solver, batch_dims=0, rtol=1e-6, on_failure="raise")
        assert solution.value.dtype == dtype
        assert abs(solution.value.item() - answer) < 1e-4
