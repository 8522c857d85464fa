"""The iMLP: a token mixer whose hidden layers are an implicit layer."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Unpack, cast

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from imixer.checkpoint import translate_published_keys
from imixer.contraction import layer_bound
from imixer.contractive_block import ContractiveBlock, Coupling, JointBlock, sweep
from imixer.folded_batch_norm import fold_batch_norm
from imixer.imlp_options import (
    IMLP_OPTIONS,
    SOLVER_OPTIONS,
    IMLPOptions,
    SolverChanges,
    check_names,
    complete,
    lists_options,
)
from imixer.solver_options import check_solver, is_joint, layer_arguments
from implicit import FixedPointLayer, fixed_point, lipschitz_bound, spectral_norm

_BATCH = ("batch", "batch_per_step")


@lists_options
@register_notrace_module  # torch.fx has no values, which checks of the map and tests for convergence look at
class IMLP(nn.Module):
    """``fc2(act(z))`` at the solution of ``z = y + g(z)``, with ``y = fc1(x)`` and ``g = sn2 o act o sn1 o act``.

    The hidden layers of a hierarchical Hopfield network replace the hidden layer of an MLP. The paper's model has two
    of them, and g is the contractive block of ``sn1`` and ``sn2``, which are linear layers under soft spectral
    normalization. The weights are computed once per forward pass and enter the map as explicit tensors. The solve
    starts at ``z = y``. As in the paper, it takes ``n_iter`` Picard steps by default, and gradients flow through them.

    It can replace ``timm.layers.Mlp``: it maps (..., in_features) to (..., out_features), each row by itself.

    **Depth.** Let W_k (``sn1``, ``sn3``, ...) and V_k (``sn2``, ``sn4``, ...) be the weights between the hidden layers
    k and k + 1 of H. Then

        g = F_1,    F_k(x) = V_k act((1 - F_{k+1})^{-1} W_k act(x)),    F_{H-1}(x) = V_{H-1} act(W_{H-1} act(x)).

    One hidden layer is Mixer's MLP, with nothing to solve. For three and more, ``hidden_solve`` says how to solve:

    - "nested": each inverse is a solve inside the map of the layer below, with the same options, and implicit inside
      implicit where the backward mode is implicit. n steps cost 2 (n + ... + n^{H-1}) matrix products. Under ``rtol``
      each level is solved ten times as accurately as the one around it. Every inner solve starts anew, because a start
      that it remembers would make the map differ from call to call. The map's Lipschitz constant is at most
      ``imixer.contraction.nested_bound``.
    - "joint": one solve for all layers, whose state is the tuple of h_1, h_3, ...; n steps cost 2 (H - 1) n products,
      and the start costs 2 (H - 2). In the norm of that state the Lipschitz constant is at most
      ``imixer.contraction.joint_bound``.

    Both have the same parameters and the same solution, and with two hidden layers they are the same solve; with one
    step they return the same. "joint" takes fewer products. Where all weights have the same spectral norm, one bound is
    below 1 if and only if the other is.

    **Tied weights** are symmetric couplings, ``fc2 = fc1'`` and ``V_k = W_k'``. The network then has an energy, which
    is stationary at the solution. Each layer of units, the outputs too, has one bias: the second one that untied layers
    have would only add to the first. Tied weights need as many outputs as inputs.

    **Batch normalization** normalizes what each linear layer of the map returns, over all rows. There are two ways:

    - ``norm="batch"``: the statistics are those of a first pass through the layers at the start z = y. They are taken
      once, with gradients, and are constants of the solve, folded into its weights, as running statistics are in eval
      mode. So the rows are independent problems for the solver, although in training mode they depend on each other
      through these statistics. Running statistics are updated once per forward pass.
    - ``norm="batch_per_step"``: the ablation in the paper's Table 3. In training mode each step takes the statistics of
      its own inputs and updates the running ones. The map then changes from step to step and mixes the rows of a batch,
      so that the steps are not the solve of any equation. Only a fixed number of unrolled Picard steps is meaningful;
      other solvers and backward modes, ``rtol``, and more than two hidden layers are refused. In eval mode both are the
      same map with running statistics, which ``norm="batch_per_step"`` collects over all steps and ``norm="batch"`` at
      the first.

    **Contraction.** ``contraction="paper"`` bounds each spectral norm by ``coeff``, as far as power iteration knows it,
    and ignores the slope of the activation, which reaches 1.129 for GELU: it guarantees nothing. "certified" guarantees
    Lip(g) <= ``coeff`` < 1 in the Euclidean norm, and the same for the joint map, up to the rounding of the products.
    The spectral norms are bounded from above, by Gram iteration in float64 in every forward pass, and the bounds take
    the slope into account. This costs much more than power iteration where float64 is slow, and it needs an activation
    of torch.nn without parameters.

    Args:
        in_features: Size of the last dimension of the input.
        hidden_features: Size D of the lowest hidden layer, the implicit state; by default ``in_features``.
        out_features: Size of the last dimension of the output; by default ``in_features``.
        act_layer: Makes the activation.
        bias: Whether the linear layers have a bias.
        drop: Dropout rate after the activation of the solution and after ``fc2``.
        device: Where the parameters are created.
        dtype: Type of the parameters.
        **options: The options of :class:`imixer.IMLPOptions`. Rows that do not reach ``rtol`` in ``n_iter`` steps are
            reported by a ``solvers.ConvergenceWarning``.

    Raises:
        TypeError, ValueError: An option does not exist or is not valid, or two do not go together.

    References:
        Ota and Taki, "iMixer: hierarchical Hopfield network implies an invertible, implicit and iterative MLP-Mixer",
        arXiv:2304.13061 (2023), section 4 and appendix B.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[IMLPOptions],
    ) -> None:
        check_names("IMLP()", options, IMLP_OPTIONS)
        super().__init__()
        self._options = complete(options)
        check_solver(self._options)
        norm, hidden_layers, tied = self._options["norm"], self._options["hidden_layers"], self._options["tied"]
        state = hidden_features or in_features
        inner = int(state * self._options["h_ratio"])
        out_features = out_features or in_features
        if inner < 1:
            raise ValueError(
                f"h_ratio={self._options['h_ratio']!r} leaves the block of a state of size {state} no inner layer."
            )
        if tied and norm in _BATCH:
            raise ValueError(
                f"tied=True needs another norm than {norm!r}, which scales W_k and V_k = W_k' differently."
            )
        if tied and out_features != in_features:
            raise ValueError(f"tied=True needs as many outputs as inputs, got {in_features} and {out_features}.")
        act = act_layer()
        self.hidden_layers = hidden_layers
        self.norm = norm
        self.tied = tied
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, state, bias=bias, **factory_kwargs)
        # Numbered upwards from the lowest hidden layer, downwards to it, upwards from the next one, and so on.
        shapes = {}
        for k in range(1, hidden_layers):
            below = state if k == 1 else inner
            shapes[2 * k - 1] = (below, inner)
            if not tied:
                shapes[2 * k] = (inner, below)
        normalize = _normalization(self._options, act)
        for number, (inputs, outputs) in shapes.items():
            linear = nn.Linear(inputs, outputs, bias=bias and norm not in _BATCH, **factory_kwargs)
            self.add_module(f"fc_sn{number}", normalize(linear))
            if norm in _BATCH:
                self.add_module(f"bn{number}", nn.BatchNorm1d(outputs, **factory_kwargs))
        self._numbers = tuple(shapes)
        self.fc2 = (
            TiedLinear(out_features, bias=bias, **factory_kwargs)
            if tied
            else nn.Linear(state, out_features, bias=bias, **factory_kwargs)
        )
        self.act = act
        self.drop1 = nn.Dropout(drop)
        self.drop2 = nn.Dropout(drop)
        self.fixed_point = _fixed_point(act, self._options)
        self.register_load_state_dict_pre_hook(_translate_on_load)  # type: ignore[no-untyped-call]

    def init_weights(self) -> None:
        """Initialize what timm's initialization does not reach, by timm's scheme.

        That is Xavier-uniform for parametrized weights, where timm would write to computed copies.
        """
        for layer in self.normalized_layers:
            if parametrize.is_parametrized(layer):
                # Assigning settles the singular vectors as well.
                layer.weight = nn.init.xavier_uniform_(torch.empty_like(layer.weight))
        if self.tied and self.fc2.bias is not None:
            nn.init.normal_(self.fc2.bias, std=1e-6)

    @property
    def normalized_layers(self) -> tuple[nn.Linear, ...]:
        """The linear layers of the map: ``sn1``, ``sn2``, ...; if tied, only ``sn1``, ``sn3``, ..."""
        return tuple(getattr(self, f"fc_sn{number}") for number in self._numbers)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Exact spectral norms of the weights of these layers, before spectral normalization where there is one."""
        found = []
        for layer in self.normalized_layers:
            weight = layer.weight
            if self.norm == "spectral":
                weight = cast(Tensor, layer.get_parameter("parametrizations.weight.original"))
            found.append(float(torch.linalg.matrix_norm(weight.detach().double(), 2)))
        return tuple(found)

    @property
    def options(self) -> IMLPOptions:
        """All options as they are now, in a new dictionary; :meth:`set_solver` changes them."""
        return self._options.copy()

    def set_solver(self, **changes: Unpack[SolverChanges]) -> "IMLP":
        """Change how the fixed point is solved for; see :meth:`imixer.IMixer.set_solver`."""
        change_solvers([self], changes)
        return self

    def couplings(self, y: Tensor | None = None) -> tuple[Coupling, ...]:
        """The weights of the map, from the lowest coupling upwards.

        Args:
            y: (rows, D) the injection, from which batch normalization in training mode takes its statistics. Without
                it, the running statistics are used.
        """
        layers = self.normalized_layers
        pairs = self._folded(layers, y) if self.norm in _BATCH else [(layer.weight, layer.bias) for layer in layers]
        if self.tied:
            return tuple(Coupling(weight, bias, weight.t(), None) for weight, bias in pairs)
        return tuple(Coupling(*up, *down) for up, down in zip(pairs[::2], pairs[1::2], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if isinstance(x, Proxy):  # a trace by torch.fx without timm's list of leaves: this is one
            return cast(Tensor, x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {}))
        y = self.fc1(x)
        z = y
        if self.fixed_point is not None:
            rows = y.flatten(0, -2)  # (rows, D): every row is a problem of its own
            if self.norm == "batch_per_step" and any(norm.training for norm in self._batch_norms):
                z = self._steps_with_batch_statistics(rows)
            else:
                z = self.fixed_point(rows, *self.couplings(rows))
            z = (z[0] if isinstance(z, tuple) else z).view_as(y)
        z = self.drop1(self.act(z))
        output: Tensor = self.drop2(self.fc2(z, self.fc1.weight.t()) if self.tied else self.fc2(z))
        return output

    @property
    def _batch_norms(self) -> list[nn.BatchNorm1d]:
        return [cast(nn.BatchNorm1d, self.get_submodule(f"bn{number}")) for number in self._numbers]

    def _steps_with_batch_statistics(self, y: Tensor) -> Tensor:
        """``n_iter`` steps, each of which applies the batch normalizations anew. (rows, D) -> the same."""
        pairs = list(zip(self.normalized_layers, self._batch_norms, strict=True))

        def step(z: Tensor) -> Tensor:
            for layer, norm in pairs:
                z = norm(layer(self.act(z)))
            return y + z

        return fixed_point(
            step, y, solver="picard", backward="unrolled", rtol=None, atol=None, max_steps=self._options["n_iter"]
        )

    def _folded(self, layers: tuple[nn.Linear, ...], y: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """The weights and biases of the linear layers with the normalization after each folded in."""
        norms = self._batch_norms
        if y is None or not any(norm.training for norm in norms):
            return [fold_batch_norm(norm, layer.weight) for norm, layer in zip(norms, layers, strict=True)]
        folded = {}

        def normalized(i: int, x: Tensor) -> Tensor:
            folded[i] = fold_batch_norm(norms[i], layers[i].weight, x if norms[i].training else None)
            return F.linear(x, *folded[i])

        ups, downs = ([functools.partial(normalized, i) for i in range(first, len(layers), 2)] for first in (0, 1))
        sweep(self.act, y, ups, downs)
        return [folded[i] for i in range(len(layers))]


class TiedLinear(nn.Module):
    """A linear layer with the weight of another layer, and a bias of its own."""

    bias: Tensor | None

    def __init__(
        self,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., in) -> (..., out) by a weight (out, in)."""
        return F.linear(x, weight, self.bias)


def _normalization(options: IMLPOptions, act: nn.Module) -> Callable[[nn.Linear], nn.Linear]:
    """A function that makes a linear layer of the map from a plain one."""
    norm, coeff = options["norm"], options["coeff"]
    if options["contraction"] == "certified":
        if norm != "spectral":
            raise ValueError(f'contraction="certified" needs norm="spectral", got {norm!r}, which bounds no norm.')
        if not 0 < coeff < 1:
            raise ValueError(f'contraction="certified" bounds Lip(g) by coeff, in (0, 1); got {coeff!r}.')
        if next(act.parameters(), None) is not None:
            raise ValueError(
                f"The slope of {act} changes with its parameters, so that no bound can be certified before training. "
                "Choose an activation without parameters."
            )
        try:
            slope = float(lipschitz_bound(act))
        except TypeError:
            raise TypeError(
                f"No Lipschitz constant is known for the activation {act}, so that nothing can be certified. Choose "
                'one of torch.nn such as GELU, ReLU or Tanh, or contraction="paper".'
            ) from None
        bound = layer_bound(coeff, slope, options["hidden_layers"])
        return functools.partial(spectral_norm, coeff=bound, method="gram")
    if norm == "spectral":
        return functools.partial(spectral_norm, coeff=coeff, n_power_iterations=options["n_power"])
    if norm == "weight":
        return parametrizations.weight_norm
    return lambda linear: linear


def change_solvers(imlps: Iterable[IMLP], changes: SolverChanges) -> None:
    """:meth:`IMLP.set_solver` for all of them or, if a value is not valid for one of them, for none."""
    check_names("set_solver()", changes, SOLVER_OPTIONS)
    changed = [(imlp, complete({**imlp.options, **changes})) for imlp in imlps]
    for _, options in changed:
        check_solver(options)
    for imlp, options in changed:
        imlp._options = options
        layers = [module for module in imlp.modules() if isinstance(module, FixedPointLayer)]  # outer ones first
        for level, layer in enumerate(layers):
            for name, value in layer_arguments(options, level).items():
                setattr(layer, name, value)


def _fixed_point(act: nn.Module, options: IMLPOptions) -> FixedPointLayer | None:
    """The layer that solves for the hidden layers; None where there is nothing to solve."""
    if is_joint(options):
        block = JointBlock(act)
        return FixedPointLayer(block, init=block.start, **layer_arguments(options, 0))
    layer = None
    for level in reversed(range(options["hidden_layers"] - 1)):
        layer = FixedPointLayer(
            ContractiveBlock(act, layer), init=_start_at_injection, **layer_arguments(options, level)
        )
    return layer


def _start_at_injection(y: Tensor, *_: Coupling) -> Tensor:
    return y


def _translate_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    translate_published_keys(state_dict, prefix)
