"""The size of a map's Jacobian as a term of the loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from implicit.autograd.constant_weights import constant_weights
from solvers.problem.flat_map import FlatMap
from solvers.problem.hyperparameters import checked_int
from solvers.problem.layout import Layout


def jacobian_regularization(
    f: Callable[..., Any],
    z: Any,
    *inputs: Any,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    batch_dims: int = 1,
) -> Tensor:
    """Estimate the size of a map's Jacobian for each sample, as a term of the loss.

        norm(df/dz)_F^2 / D  =  E norm(v' df/dz)^2 / D,     where v has D independent random signs.

    Add it with a small weight to keep the map easy to solve: the Jacobian of an equilibrium layer tends to grow during
    training, and the solver then needs more and more steps. As in the paper, the term is divided by the number D of
    entries in a sample, so that it is 1 for the identity of any size. Its square root bounds the root mean square of
    the eigenvalues, but not the largest one. To look at the largest one, use
    :func:`implicit.diagnostics.spectral_radius`; to bound it, use :func:`implicit.spectral_norm`.

    The estimate is unbiased. Signs give a smaller variance than the normal entries of the paper, and none at all if the
    rows of the Jacobian are orthogonal. Gradients reach ``z``, the inputs, and everything else that f depends on. The
    cost is one call of f and ``num_samples`` vector-Jacobian products, and a double backward pass through them for the
    gradient: together about twice a call of f and its gradient.

    If ``z`` carries its gradient, the term is differentiated through the solution as well. Next to a loss on the
    solution this costs no further linear solve, since one serves both. The paper treats z as a constant: pass
    ``z.detach()`` for that.

    Args:
        f: The map, as in :func:`implicit.fixed_point`; it must not mix samples.
        z: The point at which the Jacobian is taken, usually the fixed point.
        *inputs: Passed to ``f`` after the state.
        num_samples: Number of random vectors to average over. One suffices, since the noise averages out over batches.
        generator: Source of the random signs; by default PyTorch's own generator.
        batch_dims: As in :func:`solvers.solve`.

    Returns:
        (B,) estimates, which are never negative; in the dtype of the state, but at least float32.

    Raises:
        TypeError, ValueError: The state, an option or the result of ``f`` is invalid.

    References:
        Bai, Koltun and Kolter, "Stabilizing equilibrium models by Jacobian regularization", ICML (2021), section 4.
        Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines",
        Communications in Statistics: Simulation and Computation 18 (1989).

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer, jacobian_regularization
        >>> layer = FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z) + x)
        >>> x = torch.ones(2, 3)
        >>> z = layer(x)
        >>> loss = z.square().mean() + 0.1 * jacobian_regularization(layer.f, z, x).mean()
    """
    num_samples = checked_int("num_samples", num_samples)
    layout = Layout(z, batch_dims)
    flat = layout.pack(z)  # (B, D)
    # The term's own gradient differentiates twice, which the other kernels of attention cannot.
    with constant_weights(), sdpa_kernel(SDPBackend.MATH):
        _, pullback = torch.func.vjp(FlatMap(f, inputs, layout), flat)[:2]
    total = flat.new_zeros(len(flat))
    for _ in range(num_samples):
        bits = torch.randint(2, flat.shape, generator=generator, dtype=flat.dtype, device=flat.device)
        (product,) = pullback(2 * bits - 1)
        total = total + product.square().sum(dim=1)
    return layout.unpack_batch(total / (num_samples * max(flat.shape[1], 1)))
