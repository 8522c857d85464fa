"""The iMLP: a token mixer whose hidden layers are an implicit layer."""

import functools
from collections.abc import Callable, Iterable
from types import EllipsisType
from typing import Any, Literal, cast, get_args

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from imixer.checkpoint import translate_published_keys
from imixer.contraction import layer_bound
from imixer.contractive_block import ContractiveBlock, Coupling, JointBlock, sweep
from imixer.folded_batch_norm import fold_batch_norm
from imixer.solver_options import SolverOptions
from implicit import Backward, FixedPointLayer, lipschitz_bound, spectral_norm
from solvers import Solver

Norm = Literal["spectral", "none", "batch", "weight"]
HiddenSolve = Literal["nested", "joint"]
Contraction = Literal["paper", "certified"]


@register_notrace_module  # torch.fx has no values, which checks of the map and tests for convergence look at
class IMLP(nn.Module):
    """``fc2(act(z))`` at the solution of ``z = y + g(z)``, with ``y = fc1(x)`` and ``g = sn2 o act o sn1 o act``.

    The hidden layers of a hierarchical Hopfield network take the place of the hidden layer of an MLP: two of them in
    the paper's model, where g is the contractive block of ``sn1`` and ``sn2``, linear layers under soft spectral
    normalization. The weights are computed once a forward pass and enter the map as explicit tensors. The start is
    ``z = y``. As in the paper, the default solve is ``n_iter`` Picard steps, trained end to end.

    A drop-in for ``timm.layers.Mlp``: maps (..., in_features) to (..., out_features), every row by itself.

    **Depth.** Let W_k (``sn1``, ``sn3``, ...) and V_k (``sn2``, ``sn4``, ...) be the weights between the hidden layers
    k and k + 1 of H. Then

        g = F_1,    F_k(x) = V_k act((1 - F_{k+1})^{-1} W_k act(x)),    F_{H-1}(x) = V_{H-1} act(W_{H-1} act(x)).

    One hidden layer is Mixer's MLP, with nothing to solve. For three and more, ``hidden_solve`` says how:

    - "nested": each inverse is a solve inside the map of the one below, with the same options, and implicit inside
      implicit where the backward mode is. n steps cost 2 (n + ... + n^{H-1}) matrix products. Under ``rtol`` each level
      is solved ten times as accurately as the one around it. Every inner solve starts anew: what it kept would make
      the map another one from call to call. The map's Lipschitz constant is at most
      ``imixer.contraction.nested_bound``.
    - "joint": one solve for all layers, whose state is the tuple of h_1, h_3, ...; n steps cost 2 (H - 1) n products,
      and the start 2 (H - 2). In the norm of that state the Lipschitz constant is at most
      ``imixer.contraction.joint_bound``.

    Where all weights have one spectral norm, one bound is below 1 just when the other is. Parameters and solution are
    the same, and with two hidden layers the solves are too. "joint" is the cheaper one; with one step both do the same.

    **Batch normalization** (``norm="batch"``) is of what each linear layer of the map returns, over all rows. Inside a
    map it would take other statistics in every call of one solve and couple the rows, so that there would be no
    equation to solve. Here the statistics are those of a first pass through the layers, at the start z = y, taken once
    and differentiated. They are constants of the solve, folded into its weights, as the running statistics are in eval
    mode, which advance once a forward pass. So in training mode the rows of a batch depend on each other, as always
    with it, and yet are independent problems for the solver. The published code has no such variant.

    Args:
        in_features: Size of the last dimension of the input.
        hidden_features: Size D of the lowest hidden layer, the implicit state; by default ``in_features``.
        out_features: Size of the last dimension of the output; by default ``in_features``.
        act_layer: Makes the activation.
        bias: Whether the linear layers have one.
        drop: Dropout rate after the activation of the solution and after ``fc2``.
        h_ratio: Width of the other hidden layers, as a multiple of D.
        n_iter: Steps of the solver: exactly so many when ``rtol`` is None, else at most.
        n_power: Power iterations a forward pass in training mode.
        coeff: Bound on the spectral norms of the map's weights; with ``contraction="certified"`` on Lip(g).
        solver: A solver or its name.
        backward: A backward mode or its name.
        rtol: Relative tolerance of the solve, or None for a fixed number of steps. Rows that do not reach it in
            ``n_iter`` steps are a ``solvers.ConvergenceWarning``.
        hidden_layers: Number H of hidden layers.
        hidden_solve: "nested" or "joint".
        tied: Symmetric couplings, ``fc2 = fc1'`` and ``V_k = W_k'``, for which the network has an energy, stationary at
            the solution. Needs as many outputs as inputs. Each layer of units, the outputs too, has one bias, an input
            current: a second one, as untied layers have it, would only add to the first.
        norm: "spectral", "none", "batch" (see above) or "weight", for PyTorch's weight normalization.
        contraction: "paper" bounds each spectral norm by ``coeff``, as far as power iteration knows it, and disregards
            the slope of the activation, 1.129 for GELU: no guarantee. "certified" guarantees Lip(g) <= ``coeff`` < 1 in
            the Euclidean norm, and as much of the joint map, up to what products round: the norms are bounded from
            above, by Gram iteration in float64 at every forward pass, and take the slope into account. It costs much
            more than power iteration where float64 is slow, and needs an activation of torch.nn without parameters.
        device: Where the parameters are made.
        dtype: Of the parameters.

    Raises:
        TypeError, ValueError: An option is unfit, or two do not go together.

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
        h_ratio: float = 2.0,
        n_iter: int = 2,
        n_power: int = 8,
        coeff: float = 0.9,
        solver: Solver | str = "picard",
        backward: Backward | str = "unrolled",
        rtol: float | None = None,
        hidden_layers: int = 2,
        hidden_solve: HiddenSolve = "nested",
        tied: bool = False,
        norm: Norm = "spectral",
        contraction: Contraction = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        state = hidden_features or in_features
        inner = int(state * h_ratio)
        out_features = out_features or in_features
        if inner < 1:
            raise ValueError(f"h_ratio={h_ratio!r} leaves the block of a state of size {state} no inner layer.")
        if not isinstance(hidden_layers, int) or isinstance(hidden_layers, bool) or hidden_layers < 1:
            raise ValueError(f"hidden_layers must be a positive integer, got {hidden_layers!r}.")
        _check_choice("hidden_solve", hidden_solve, HiddenSolve)
        _check_choice("norm", norm, Norm)
        _check_choice("contraction", contraction, Contraction)
        if tied and norm == "batch":
            raise ValueError('tied=True needs another norm than "batch", which scales W_k and V_k = W_k\' differently.')
        if tied and out_features != in_features:
            raise ValueError(f"tied=True needs as many outputs as inputs, got {in_features} and {out_features}.")
        self._options = SolverOptions(n_iter=n_iter, solver=solver, backward=backward, rtol=rtol)
        act = act_layer()
        self.hidden_layers = hidden_layers
        self.norm = norm
        self.tied = tied
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(in_features, state, bias=bias, **made)
        # By their numbers: up from the lowest hidden layer, down to it, up from the next ...
        shapes = {}
        for k in range(1, hidden_layers):
            below = state if k == 1 else inner
            shapes[2 * k - 1] = (below, inner)
            if not tied:
                shapes[2 * k] = (inner, below)
        normalize = _normalization(norm, contraction, coeff, n_power, act, hidden_layers)
        for number, (inputs, outputs) in shapes.items():
            linear = nn.Linear(inputs, outputs, bias=bias and norm != "batch", **made)
            self.add_module(f"fc_sn{number}", normalize(linear))
            if norm == "batch":
                self.add_module(f"bn{number}", nn.BatchNorm1d(outputs, **made))
        self._numbers = tuple(shapes)
        self.fc2 = (
            TiedLinear(out_features, bias=bias, **made) if tied else nn.Linear(state, out_features, bias=bias, **made)
        )
        self.act = act
        self.drop1 = nn.Dropout(drop)
        self.drop2 = nn.Dropout(drop)
        self.fixed_point = _fixed_point(act, hidden_layers, hidden_solve, self._options)
        self.register_load_state_dict_pre_hook(_translate_on_load)  # type: ignore[no-untyped-call]

    def init_weights(self) -> None:
        """timm's scheme where timm's own initialization does not reach.

        That is Xavier-uniform for parametrized weights, of which timm would write to computed copies.
        """
        for layer in self.normalized_layers:
            if parametrize.is_parametrized(layer):
                # Assigning settles the singular vectors as well.
                layer.weight = nn.init.xavier_uniform_(torch.empty_like(layer.weight))
        if self.tied and self.fc2.bias is not None:
            nn.init.normal_(self.fc2.bias, std=1e-6)

    @property
    def normalized_layers(self) -> tuple[nn.Linear, ...]:
        """The linear layers of the map: ``sn1``, ``sn2``, ...; of tied ones the upward, ``sn1``, ``sn3``, ..."""
        return tuple(getattr(self, f"fc_sn{number}") for number in self._numbers)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Exact spectral norms of the weights of these layers, where they are spectrally normalized before that."""
        found = []
        for layer in self.normalized_layers:
            weight = layer.weight
            if self.norm == "spectral":
                weight = cast(Tensor, layer.get_parameter("parametrizations.weight.original"))
            found.append(float(torch.linalg.matrix_norm(weight.detach().double(), 2)))
        return tuple(found)

    @property
    def solver_options(self) -> SolverOptions:
        """How the fixed point is solved for; assigning changes it, in nested solves too."""
        return self._options

    @solver_options.setter
    def solver_options(self, options: SolverOptions) -> None:
        self._options = options
        layers = [module for module in self.modules() if isinstance(module, FixedPointLayer)]  # outer ones first
        for level, layer in enumerate(layers):
            for name, value in options.of_layer(level).items():
                setattr(layer, name, value)

    def set_solver(
        self,
        *,
        n_iter: int | EllipsisType = ...,
        solver: Solver | str | EllipsisType = ...,
        rtol: float | EllipsisType | None = ...,
        backward: Backward | str | EllipsisType = ...,
    ) -> "IMLP":
        """Solve in another way from now on; what is not given stays. See :meth:`imixer.IMixer.set_solver`."""
        change_solvers([self], n_iter=n_iter, solver=solver, rtol=rtol, backward=backward)
        return self

    def couplings(self, y: Tensor | None = None) -> tuple[Coupling, ...]:
        """The weights of the map, from the lowest coupling on.

        Args:
            y: (rows, D) the injection, of which batch normalization in training mode takes its statistics;
                without it they are the running ones.
        """
        layers = self.normalized_layers
        pairs = self._folded(layers, y) if self.norm == "batch" else [(layer.weight, layer.bias) for layer in layers]
        if self.tied:
            return tuple(Coupling(weight, bias, weight.t(), None) for weight, bias in pairs)
        return tuple(Coupling(*up, *down) for up, down in zip(pairs[::2], pairs[1::2], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y = self.fc1(x)
        z = y
        if self.fixed_point is not None:
            rows = y.flatten(0, -2)  # (rows, D): every row is a problem of its own
            z = self.fixed_point(rows, *self.couplings(rows))
            z = (z[0] if isinstance(z, tuple) else z).view_as(y)
        z = self.drop1(self.act(z))
        output: Tensor = self.drop2(self.fc2(z, self.fc1.weight.t()) if self.tied else self.fc2(z))
        return output

    def _folded(self, layers: tuple[nn.Linear, ...], y: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """The weights and biases of the linear layers with the normalization after each folded in."""
        norms = [getattr(self, f"bn{number}") for number in self._numbers]
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
    """A linear layer with the weight of another: its own is the bias alone."""

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


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}.")


def _normalization(
    norm: Norm, contraction: Contraction, coeff: float, n_power: int, act: nn.Module, hidden_layers: int
) -> Callable[[nn.Linear], nn.Linear]:
    """What makes a linear layer of the map out of a plain one."""
    if contraction == "certified":
        if norm != "spectral":
            raise ValueError(f'contraction="certified" needs norm="spectral", got {norm!r}, which bounds no norm.')
        if not 0 < coeff < 1:
            raise ValueError(f'contraction="certified" bounds Lip(g) by coeff, in (0, 1); got {coeff!r}.')
        if next(act.parameters(), None) is not None:
            raise ValueError(
                f"The slope of {act} changes with its parameters, so that no bound can be certified ahead of training. "
                "Choose an activation without any."
            )
        try:
            slope = float(lipschitz_bound(act))
        except TypeError:
            raise TypeError(
                f"No Lipschitz constant is known for the activation {act}, so that nothing can be certified. Choose "
                'one of torch.nn such as GELU, ReLU or Tanh, or contraction="paper".'
            ) from None
        bound = layer_bound(coeff, slope, hidden_layers)
        return functools.partial(spectral_norm, coeff=bound, method="gram")
    if norm == "spectral":
        return functools.partial(spectral_norm, coeff=coeff, n_power_iterations=n_power)
    if norm == "weight":
        return parametrizations.weight_norm
    return lambda linear: linear


def change_solvers(imlps: Iterable[IMLP], **given: Any) -> None:
    """:meth:`IMLP.set_solver` for all of them, or, if a value is unfit for one, for none."""
    changed = [(imlp, imlp.solver_options.changed(**given)) for imlp in imlps]
    for imlp, options in changed:
        if imlp.fixed_point is not None:
            options.check_depth(imlp.hidden_layers, joint=isinstance(imlp.fixed_point.f, JointBlock))
    for imlp, options in changed:
        imlp.solver_options = options


def _fixed_point(
    act: nn.Module, hidden_layers: int, hidden_solve: HiddenSolve, options: SolverOptions
) -> FixedPointLayer | None:
    """The layer that solves for the hidden layers; None where there is nothing to solve."""
    joint = hidden_solve == "joint" and hidden_layers > 2
    options.check_depth(hidden_layers, joint=joint)
    if joint:
        block = JointBlock(act)
        return FixedPointLayer(block, init=block.start, **options.of_layer(0))
    layer = None
    for level in reversed(range(hidden_layers - 1)):
        layer = FixedPointLayer(ContractiveBlock(act, layer), init=_start_at_injection, **options.of_layer(level))
    return layer


def _start_at_injection(y: Tensor, *_: Coupling) -> Tensor:
    return y


def _translate_on_load(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    translate_published_keys(state_dict, prefix)
