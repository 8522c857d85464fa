"""Spectral normalization by power iteration."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList

from implicit.autograd.torch_internals import in_backward_pass
from implicit.spectral.linear_operator import LinearOperator
from implicit.spectral.parametrization import SpectralNorm
from solvers.problem.autocast import without_autocast
from solvers.problem.hyperparameters import checked_int

# Number of power iterations from a random start. They run only at construction and when a weight is assigned, so
# their cost does not matter; the iterations in training start where the last ones ended.
_SETTLING_ITERATIONS = 100

# Devices on which matrix-vector products are faster one after the other than in a batch. Elsewhere, starting kernels
# takes most of the time, and a batch starts fewer of them.
_ONE_BY_ONE = {"cpu"}


# Left and right singular vectors.
Vectors = tuple[Tensor, Tensor]


class PowerIteration(SpectralNorm):
    """Normalize by power iteration, which approaches sigma from below and follows the weight during training.

    In training mode, every computation of the weight first advances the power iteration by ``n_power_iterations``. In
    eval mode the singular vectors do not change. They do not change either when gradient checkpointing computes the
    weight again in the backward pass, so the weight is the same as in the forward pass, unless another forward pass
    came in between, or the layer is compiled and the checkpoint around it is not. The gradient treats the singular
    vectors as constants, which gives the gradient of sigma. Everything is computed in float32 or float64, also under
    autocast.

    Args:
        weight: The initial weight, which determines the shapes, the device and the first singular vectors.
        operator: The linear operator that the layer forms from the weight.
        coeff: Upper bound on the spectral norm; larger weights are rescaled to it.
        n_power_iterations: Number of power iterations per computation of the weight in training mode.
        input_size: For a convolution, the spatial size of the inputs.

    Attributes:
        u: (out,) the left singular vector; (out channels, *output size) for a convolution.
        v: (in,) the right singular vector; (in channels, *input_size) for a convolution.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self,
        weight: Tensor,
        operator: LinearOperator,
        *,
        coeff: float,
        n_power_iterations: int,
        input_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__(operator, coeff=coeff)
        n_power_iterations = checked_int("spectral_norm(n_power_iterations=...)", n_power_iterations)
        dims = len(operator.kernel_size)
        if len(input_size or ()) != dims:
            raise ValueError(
                f"The norm of this layer with {dims} spatial dimensions depends on the size of its inputs for "
                f"method='power', got input_size={input_size!r}. Give input_size, a sequence of {dims} integers, or "
                "choose method='gram' or 'exact', whose bound holds for every size."
                if dims
                else f"input_size is only for convolutions, got {input_size!r} with an nn.Linear. Leave it out."
            )
        self.n_power_iterations = n_power_iterations
        # Set inside of power_iterations_advanced while torch.compile traces, which knows no ContextVar.
        self._advanced: Vectors | None = None
        # Set inside of power_iterations_advanced, for layers that are compiled while the model around them is not.
        self._is_advanced = False
        v = weight.new_empty(weight.shape[1] * operator.groups, *(input_size or ()))
        self.register_buffer("u", torch.empty_like(operator(weight, v)))
        self.register_buffer("v", v)
        self.settle(weight)

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Compute the singular vectors of ``weight`` from a random start."""
        if weight.is_meta:
            return
        self.u.copy_(_unit(self.u.normal_()))
        self.v.copy_(_unit(torch.ones_like(self.v)))  # which stays where the weight is zero
        self._advance(weight, _SETTLING_ITERATIONS)

    def forward(self, weight: Tensor) -> Tensor:
        """Return a weight of the same shape with a norm of at most ``coeff``, up to the error of power iteration."""
        u, v = self._singular_vectors(weight)
        return weight / (self._sigma(weight, u, v) / self.coeff).clamp_min(1.0).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight itself, after computing its singular vectors."""
        self.settle(weight)
        return weight

    @torch.no_grad()
    def sigma(self, weight: Tensor) -> Tensor:
        """Return the spectral norm of the unnormalized ``weight``, estimated with the current singular vectors."""
        return self._sigma(weight, self.u, self.v)

    def _sigma(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        with without_autocast(weight.device.type):
            weight, u, v = _at_least_float32(weight), _at_least_float32(u), _at_least_float32(v)
            return torch.dot(u.flatten(), self.operator(weight, v).flatten())

    def _singular_vectors(self, weight: Tensor) -> Vectors:
        advanced = self.advanced_vectors()
        if advanced is not None:
            return advanced
        if self.training and not in_backward_pass() and not (torch.compiler.is_compiling() and self._is_advanced):
            return self._advance(weight.detach(), self.n_power_iterations)
        # The buffers may change before the backward pass of this computation, so it gets copies.
        return self.u.clone(), self.v.clone()

    def advanced_vectors(self) -> Vectors | None:
        """Inside of :func:`power_iterations_advanced`, the singular vectors of the weight; else None."""
        if self._advanced is not None or torch.compiler.is_compiling():
            return self._advanced
        return _advanced.get().get(self)

    @torch.no_grad()
    def _advance(self, weight: Tensor, iterations: int) -> Vectors:
        with without_autocast(weight.device.type):
            weight, u, v = _at_least_float32(weight), _at_least_float32(self.u), _at_least_float32(self.v)
            for _ in range(iterations):
                # The length of v cancels in u, so one normalization per iteration is enough.
                v = self.operator.adjoint(weight, u, like=v)
                u = _unit(self.operator(weight, v))
            v = _unit(v)
        # Rounded to the dtype of the buffers, so that a later computation from the buffers uses the same vectors.
        u, v = _or_before(u.to(self.u.dtype), self.u), _or_before(v.to(self.v.dtype), self.v)
        self.u.copy_(u)
        self.v.copy_(v)
        return u, v

    def extra_repr(self) -> str:
        return f"coeff={self.coeff}, n_power_iterations={self.n_power_iterations}"


# What power_iterations_advanced has computed in this thread.
_advanced: ContextVar[Mapping[PowerIteration, Vectors]] = ContextVar("advanced", default=MappingProxyType({}))


@contextlib.contextmanager
def power_iterations_advanced(module: nn.Module) -> Iterator[None]:
    """Advance all power iterations of a model once, in batches; within the context, computing a weight advances none.

    Use it in the ``forward`` of a model with many layers under :func:`implicit.spectral_norm`. On a GPU, the iterations
    of weights of equal shape run as one batch, which starts far fewer kernels. The weights are the same as without it,
    up to rounding, and a weight that is used several times is the same each time. It does nothing in eval mode or for
    methods other than "power".

    Args:
        module: The model or a part of it.

    Example:
        >>> import torch
        >>> from implicit import power_iterations_advanced, spectral_norm
        >>> net = torch.nn.Sequential(*[spectral_norm(torch.nn.Linear(4, 4)) for _ in range(3)])
        >>> with power_iterations_advanced(net):
        ...     y = net(torch.ones(2, 4))
    """
    groups: defaultdict[object, list[tuple[PowerIteration, Tensor]]] = defaultdict(list)
    for parametrized in module.modules():
        # Only the first of several parametrizations gets the stored weight; a later one advances by itself.
        if isinstance(parametrized, ParametrizationList) and isinstance(norm := parametrized[0], PowerIteration):
            weight = parametrized.original.detach()
            # Sharded weights, which are tensors of another type, are whole only within their layer.
            if norm.training and norm.advanced_vectors() is None and type(weight) is Tensor:
                batched = weight.dim() == 2 and weight.device.type not in _ONE_BY_ONE
                alike = (weight.shape, weight.dtype, weight.device, norm.u.dtype, norm.n_power_iterations)
                groups[alike if batched else norm].append((norm, weight))
    if not torch.compiler.is_compiling():
        found = {norm: vectors for group in groups.values() for norm, vectors in _advanced_together(group).items()}
        token = _advanced.set({**_advanced.get(), **found})
        for norm in found:
            norm._is_advanced = True
        try:
            yield
        finally:
            _advanced.reset(token)
            for norm in found:
                norm._is_advanced = False
        return
    try:
        for group in groups.values():
            for norm, vectors in _advanced_together(group).items():
                norm._advanced = vectors
        yield
    finally:
        for group in groups.values():
            for norm, _ in group:
                norm._advanced = None


@torch.no_grad()
def _advanced_together(group: list[tuple[PowerIteration, Tensor]]) -> dict[PowerIteration, Vectors]:
    """The singular vectors of norms whose weights are alike, advanced."""
    norms, weights = [norm for norm, _ in group], [weight for _, weight in group]
    first = norms[0]
    if len(norms) == 1:
        return {first: first._advance(weights[0], first.n_power_iterations)}
    with without_autocast(weights[0].device.type):
        weight = _at_least_float32(torch.stack(weights))  # (norms, out, in)
        u = _at_least_float32(torch.stack([norm.u for norm in norms])).unsqueeze(1)  # (norms, 1, out)
        for _ in range(first.n_power_iterations):
            v = u @ weight
            # rms_norm is one kernel, and the length does not matter before the end.
            u = F.rms_norm(v @ weight.mT, u.shape[-1:], eps=1e-30)
        u, v = (x.squeeze(1) / torch.linalg.vector_norm(x, dim=2) for x in (u, v))
        u = _or_before(u.to(first.u.dtype), torch.stack([norm.u for norm in norms]))
        v = _or_before(v.to(first.v.dtype), torch.stack([norm.v for norm in norms]))
    torch._foreach_copy_([norm.u for norm in norms], u.unbind())
    torch._foreach_copy_([norm.v for norm in norms], v.unbind())
    return dict(zip(norms, zip(u.unbind(), v.unbind(), strict=True), strict=True))


def _unit(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x)
    return x / length


def _or_before(x: Tensor, before: Tensor) -> Tensor:
    """A singular vector, or that before it where the weight is zero, or too large for anything to be left of it."""
    return torch.where(x.isfinite(), x, before)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
