"""The hierarchical Hopfield network."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from imixer.hopfield.lagrangians import Lagrangian
from imixer.hopfield.trajectory import States, Trajectory, integrate
from implicit import Backward, fixed_point
from solvers import Solution, Solver
from solvers.problem import OnFailure

# Time constants that differ by more make the dynamics stiff: an explicit method's steps are bound by the shortest.
_STIFF_RATIO = 20.0


@dataclasses.dataclass(frozen=True, eq=False)
class HierarchicalHopfield:
    """Layers x_1 (visible), x_2, ..., x_K (hidden), coupled symmetrically, with an energy.

    With the activations phi_A, the gradients of the layers' Lagrangians L_A,

        tau_1 dx_1/dt = xi_1' phi_2 - a x_1
        tau_A dx_A/dt = xi_{A-1} phi_{A-1} + xi_A' phi_{A+1} - x_A        1 < A < K
        tau_K dx_K/dt = xi_{K-1} phi_{K-1} - x_K

        E = a (x_1 . phi_1 - L_1) + sum_{A > 1} (x_A . phi_A - L_A) - sum_A phi_{A+1} . xi_A phi_A

    and ``dE/dt = -sum_A tau_A dx_A/dt . (Hessian of L_A) dx_A/dt``, which is never positive if all L_A are convex.

    :meth:`integrate` follows these equations; :meth:`settle` finds the hidden layers' equilibrium at a given visible
    layer, which they reach at once when they are fast, and :meth:`update` moves the visible layer by one step of that
    limit: iMixer's token mixing for three layers with ``decay=0``, Mixer's for two.

    States are tensors (..., n_A) with the same leading dimensions, a batch of independent networks.

    Args:
        couplings: The K - 1 matrices xi_A, (n_{A+1}, n_A). Gradients flow to them and to what they were computed from.
        lagrangians: The K Lagrangians, the visible layer's first.
        time_constants: The K positive numbers tau_A, by default all 1. They matter to :meth:`velocity`,
            :meth:`energy_rate` and :meth:`integrate` alone.
        decay: The number a >= 0. Where L_1 is homogeneous of degree one, like :class:`CentredNorm`, its term of the
            energy is zero, and a is not in dphi_1/dt but through the length of x_1, which sets the speed.
        solver: Of the equilibrium: a solver or its name.
        backward: A backward mode or its name.
        rtol: Relative tolerance of the equilibrium, with ``atol=None`` the only one; None for ``max_steps`` steps.
        atol: Absolute tolerance.
        max_steps: Most steps to take.
        on_failure: "warn", "raise" or "ignore".

    Raises:
        TypeError, ValueError: An argument is unfit.

    References:
        Krotov and Hopfield, "Large associative memory problem in neurobiology and machine learning", ICLR (2021).
        Krotov, "Hierarchical associative memory", arXiv:2107.06446 (2021).
        Ota and Taki, "iMixer: hierarchical Hopfield network implies an invertible, implicit and iterative MLP-Mixer",
        arXiv:2304.13061 (2023), appendix B.

    Example:
        >>> import torch
        >>> from imixer.hopfield import CentredNorm, HierarchicalHopfield, Softmax
        >>> patterns = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])
        >>> memory = HierarchicalHopfield([patterns], [CentredNorm(), Softmax(beta=10.0)])
        >>> memory.update(torch.tensor([0.9, 1.2, -0.3, -1.0])).round()
        tensor([ 1.,  1., -1., -1.])
    """

    couplings: Sequence[Tensor]
    lagrangians: Sequence[Lagrangian]
    _: dataclasses.KW_ONLY
    time_constants: Sequence[float] | None = None
    decay: float = 1.0
    solver: Solver | str = "anderson"
    backward: Backward | str = "implicit"
    rtol: float | None = 1e-5
    atol: float | None = None
    max_steps: int = 100
    on_failure: OnFailure = "warn"

    def __post_init__(self) -> None:
        couplings, lagrangians = tuple(self.couplings), tuple(self.lagrangians)
        if not lagrangians or not all(isinstance(one, Lagrangian) for one in lagrangians):
            raise TypeError(f"lagrangians must be a sequence of Lagrangian objects such as GELU(), got {lagrangians}.")
        shapes = [tuple(xi.shape) for xi in couplings]
        if len(couplings) != len(lagrangians) - 1 or not couplings:
            raise ValueError(
                f"K >= 2 layers have K Lagrangians and K - 1 couplings, got {len(lagrangians)} and {len(couplings)}."
            )
        chained = all(len(shape) == 2 for shape in shapes) and all(
            lower[0] == upper[1] for lower, upper in itertools.pairwise(shapes)
        )
        if not chained:
            raise ValueError(f"The couplings must be matrices (n_2, n_1), (n_3, n_2), ..., got the shapes {shapes}.")
        taus = (1.0,) * len(lagrangians) if self.time_constants is None else tuple(self.time_constants)
        if len(taus) != len(lagrangians) or not all(0 < tau < math.inf for tau in taus):
            raise ValueError(f"time_constants must be {len(lagrangians)} positive numbers, got {taus}.")
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay must be a number >= 0, got {self.decay!r}.")
        for name, value in (("couplings", couplings), ("lagrangians", lagrangians), ("time_constants", taus)):
            object.__setattr__(self, name, value)

    def activations(self, states: Sequence[Tensor]) -> States:
        """phi_A(x_A) of every layer."""
        self._check(states)
        return tuple(one.activation(x) for one, x in zip(self.lagrangians, states, strict=True))

    def energy(self, states: Sequence[Tensor]) -> Tensor:
        """E: states (..., n_A) -> (...)."""
        phis = self.activations(states)
        own = [
            rate * (_dot(x, phi) - one.value(x))
            for rate, one, x, phi in zip(self._decays, self.lagrangians, states, phis, strict=True)
        ]
        shared = [
            -_dot(upper, lower @ xi.mT)
            for (lower, upper), xi in zip(itertools.pairwise(phis), self.couplings, strict=True)
        ]
        return torch.stack(own + shared).sum(0)

    def velocity(self, states: Sequence[Tensor]) -> States:
        """dx_A/dt of every layer."""
        phis = self.activations(states)
        return tuple(
            (_inflow(layer, phis, self.couplings) - rate * x) / tau
            for layer, (rate, x, tau) in enumerate(zip(self._decays, states, self._taus, strict=True))
        )

    def energy_rate(self, states: Sequence[Tensor]) -> Tensor:
        """dE/dt along the dynamics, from the Hessians: states (..., n_A) -> (...)."""
        terms = zip(self._taus, self.lagrangians, states, self.velocity(states), strict=True)
        return torch.stack([-tau * _dot(v, one.hvp(x, v)) for tau, one, x, v in terms]).sum(0)

    def integrate(
        self,
        states: Sequence[Tensor],
        duration: float,
        *,
        adiabatic: bool = False,
        times: Sequence[float] | Tensor | None = None,
        method: str | None = None,
        rtol: float = 1e-8,
        atol: float = 1e-8,
    ) -> Trajectory:
        """Follow the dynamics by ``scipy.integrate.solve_ivp``, in float64 on the CPU and without gradients.

        The batch is integrated as one system, with common steps.

        Args:
            states: The K states at time 0.
            duration: The time to end at.
            adiabatic: Take the limit of fast hidden layers, whose states are then the equilibrium at all times,
                whatever ``states`` says of them: ``tau_1 dx_1/dt = update(x_1) - x_1``.
            times: Times to return the states at; by default those of the integrator's own steps.
            method: A method of ``solve_ivp``. By default the explicit "DOP853"; where the time constants differ by
                more than a factor of 20, the implicit "BDF", whose memory grows with the square of the size of all
                states of the batch together.
            rtol: Relative tolerance of a step; that of the equilibrium, if ``adiabatic``, is a tenth of it.
            atol: Absolute tolerance of a step.

        Raises:
            ImportError: SciPy is not installed; it comes with ``pip install 'implicit-layers[scipy]'``.
            RuntimeError: The integrator gave up, or the velocity is not finite.
            ConvergenceError: There was no equilibrium to be found, if ``adiabatic``.
        """
        self._check(states)
        if not 0 < duration < math.inf:
            raise ValueError(f"duration must be a positive number, got {duration!r}.")
        couplings = [xi.detach().double().cpu() for xi in self.couplings]
        exact = dataclasses.replace(self, couplings=couplings, rtol=rtol / 10, atol=None, on_failure="raise")
        tau = self._taus[0]
        stiff = not adiabatic and max(self._taus) > _STIFF_RATIO * min(self._taus)
        trajectory = integrate(
            (lambda x: ((exact.update(x[0]) - x[0]) / tau,)) if adiabatic else exact.velocity,
            states[:1] if adiabatic else states,
            duration,
            times=times,
            method=method or ("BDF" if stiff else "DOP853"),
            rtol=rtol,
            atol=atol,
        )
        if adiabatic:
            (visible,) = trajectory.states
            trajectory = dataclasses.replace(trajectory, states=(visible, *exact.settle(visible)))
        return trajectory

    @overload
    def settle(self, visible: Tensor, *, return_solution: Literal[False] = ...) -> States: ...

    @overload
    def settle(self, visible: Tensor, *, return_solution: Literal[True]) -> tuple[States, Solution]: ...

    def settle(self, visible: Tensor, *, return_solution: bool = False) -> Any:
        """The hidden layers' equilibrium, the joint fixed point ``x_A = xi_{A-1} phi_{A-1} + xi_A' phi_{A+1}``, A > 1.

        One step computes every other layer from its neighbours and then these from the new ones; with three layers that
        is one step of h = xi_1 phi_1 + F(h). The start is a pass upwards through the layers. Where there are several
        fixed points, the one that the solver goes to from there is returned. Differentiable in the visible layer and
        the couplings.

        Args:
            visible: (..., n_1) the visible layer's state.
            return_solution: Return ``(hidden, solution)``.

        Returns:
            The K - 1 hidden states, or the pair.

        Raises:
            ConvergenceError: A network found no equilibrium and ``on_failure="raise"``.
        """
        (first, *couplings), (g, *hidden_lagrangians) = self.couplings, self.lagrangians
        if visible.shape[-1:] != first.shape[1:]:
            raise ValueError(f"The visible layer has {first.shape[1]} units, got a state of shape {(*visible.shape,)}.")
        drive = g.activation(visible) @ first.mT
        start = [drive]
        for one, xi in zip(hidden_lagrangians[:-1], couplings, strict=True):
            start.append(one.activation(start[-1]) @ xi.mT)

        def relaxed(hidden: States, drive: Tensor, *couplings: Tensor) -> States:
            # Every other layer from its neighbours, then these from the new ones: half the steps of all layers at once.
            new = list(hidden)
            for moved in (1, 0):
                phis = {i: hidden_lagrangians[i].activation(new[i]) for i in range(1 - moved, len(new), 2)}
                for i in range(moved, len(new), 2):
                    new[i] = _inflow(i, phis, couplings, drive if i == 0 else None)
            return tuple(new)

        hidden, solution = fixed_point(
            relaxed,
            tuple(start),
            drive,
            *couplings,
            solver=self.solver,
            backward=self.backward,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            batch_dims=visible.dim() - 1,
            on_failure=self.on_failure,
            return_solution=True,
        )
        return (hidden, solution) if return_solution else hidden

    def update(self, visible: Tensor) -> Tensor:
        """One step of length tau_1 with the hidden layers settled: ``(1 - a) x_1 + xi_1' phi_2(x_2)``.

        Args:
            visible: (..., n_1) the visible layer's state.

        Returns:
            (..., n_1) its next state.

        Raises:
            ConvergenceError: As in :meth:`settle`.
        """
        phi = self.lagrangians[1].activation(self.settle(visible)[0])
        return (1 - self.decay) * visible + phi @ self.couplings[0]

    @property
    def _taus(self) -> tuple[float, ...]:
        assert self.time_constants is not None  # as the constructor left it
        return tuple(self.time_constants)

    @property
    def _decays(self) -> tuple[float, ...]:
        return (self.decay, *[1.0] * (len(self.lagrangians) - 1))

    def _check(self, states: Sequence[Tensor]) -> None:
        shapes = [tuple(x.shape) for x in states]
        sizes = [self.couplings[0].shape[1], *(xi.shape[0] for xi in self.couplings)]
        if [shape[-1:] for shape in shapes] != [(n,) for n in sizes] or len({shape[:-1] for shape in shapes}) != 1:
            raise ValueError(
                f"The layers have {sizes} units: states must be {len(sizes)} tensors of these sizes in the last "
                f"dimension, and alike in the others. Got the shapes {shapes}."
            )


def _inflow(
    layer: int,
    activations: Mapping[int, Tensor] | Sequence[Tensor],
    couplings: Sequence[Tensor],
    drive: Tensor | None = None,
) -> Tensor:
    """What a layer is sent by its neighbours, and by ``drive``."""
    terms = [] if drive is None else [drive]
    if layer > 0:
        terms.append(activations[layer - 1] @ couplings[layer - 1].mT)
    if layer < len(couplings):
        terms.append(activations[layer + 1] @ couplings[layer])
    return sum(terms[1:], start=terms[0])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1)
