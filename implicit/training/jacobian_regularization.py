"""The size of a map's Jacobian as a loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicit.autograd.constant_weights import constant_weights
from solvers.problem.flat_map import FlatMap
from solvers.problem.layout import Layout


def jacobian_regularization(
    f: Callable[..., Any],
    z: Any,
    *inputs: Any,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    batch_dims: int = 1,
) -> Tensor:
    """Estimate how large the Jacobian of a map is, for each sample, as a term of a loss.

        norm(df/dz)_F^2 / D  =  E norm(v' df/dz)^2 / D,     v of D independent random signs.

    An equilibrium layer tends to get stiffer in training: its Jacobian grows, and the solver needs more and more steps.
    This term, with a small weight, keeps the map easy to solve. Divided by the number D
    of a sample's entries, as in the paper, it is 1 for the identity whatever the size; its root bounds the root mean
    square of the eigenvalues, not the largest one: to look at that one there is
    :func:`implicit.diagnostics.spectral_radius`, and to bound it :func:`implicit.spectral_norm`.

    The estimate is unbiased. Signs have a smaller variance than the paper's normal entries, and none at all where the
    rows of the Jacobian are orthogonal. Gradients reach ``z``, the inputs, and all that f depends on. Costs one call of
    f and ``num_samples`` vector-Jacobian products, and for the gradient a double backward pass through them: about
    twice a call of f and its gradient.

    If ``z`` carries its gradient, the term is differentiated through the solution too, which costs nothing beside a
    loss that is so anyway: one linear solve serves both. The paper takes z as a constant, ``z.detach()``.

    Args:
        f: The map, as of :func:`implicit.fixed_point`: it must not mix samples.
        z: Where the Jacobian is taken, usually the fixed point.
        *inputs: Handed to ``f`` after the state.
        num_samples: Random vectors to average over. One does: the noise averages out over batches.
        generator: Source of the random signs; by default PyTorch's own.
        batch_dims: As in :func:`solvers.solve`.

    Returns:
        (B,) estimates, never negative; in the dtype of the state, at least float32.

    Raises:
        TypeError, ValueError: The state, an option or what ``f`` returns is unfit.

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
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, got {num_samples!r}.")
    layout = Layout(z, batch_dims)
    flat = layout.pack(z)  # (B, D)
    with constant_weights():
        _, pullback = torch.func.vjp(FlatMap(f, inputs, layout), flat)[:2]
    total = flat.new_zeros(len(flat))
    for _ in range(num_samples):
        bits = torch.randint(2, flat.shape, generator=generator, dtype=flat.dtype, device=flat.device)
        (product,) = pullback(2 * bits - 1)
        total = total + product.square().sum(dim=1)
    return layout.unpack_batch(total / (num_samples * max(flat.shape[1], 1)))
