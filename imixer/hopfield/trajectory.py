"""Integration in time of the states of a network's layers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

States = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """States over time, in float64 on the CPU.

    Attributes:
        times: (T,) increasing, from 0.
        states: One tensor (T, ..., n_A) for each layer.
        num_evals: How often the velocity was computed.
    """

    times: Tensor
    states: States
    num_evals: int


class IntegrationError(RuntimeError):
    """``scipy.integrate.solve_ivp`` gave up; ``error.trajectory`` holds how far it came."""

    def __init__(self, message: str, trajectory: Trajectory) -> None:
        super().__init__(message)
        self.trajectory = trajectory


def integrate(
    velocity: Callable[[States], Sequence[Tensor]],
    start: Sequence[Tensor],
    duration: float,
    *,
    times: Sequence[float] | Tensor | None,
    method: str,
    rtol: float,
    atol: float,
) -> Trajectory:
    """Integrate ``d states / dt = velocity(states)`` by ``scipy.integrate.solve_ivp``.

    Args:
        velocity: From the states to their derivatives, differentiable by ``torch.func``.
        start: The states at time 0.
        duration: The time to end at.
        times: Times to return the states at; by default those of the integrator's own steps.
        method: A method of ``solve_ivp``.
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step.

    Raises:
        ImportError: SciPy is not installed.
        IntegrationError: The integrator gave up, or the states are not finite.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError("Integrating in time needs SciPy: pip install 'implicit-layers[scipy]'") from error
    start = [x.detach().double().cpu() for x in start]
    shapes, sizes = [x.shape for x in start], [x.numel() for x in start]

    def unpack(flat: Tensor) -> States:
        """(..., D) to states with the leading dimensions in front."""
        parts = flat.split(sizes, dim=-1)
        return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))

    def flat_velocity(flat: Tensor) -> Tensor:
        return torch.cat([v.flatten() for v in velocity(unpack(flat))])

    options: dict[str, Any] = {}
    if method in ("Radau", "BDF", "LSODA"):  # those that use a Jacobian
        jacobian = torch.func.jacrev(flat_velocity)
        options["jac"] = lambda _, y: jacobian(torch.from_numpy(y)).numpy()
    with torch.no_grad():
        result = solve_ivp(
            lambda _, y: flat_velocity(torch.from_numpy(y)).numpy(),
            (0.0, duration),
            torch.cat([x.flatten() for x in start]).numpy(),
            method=method,
            t_eval=None if times is None else torch.as_tensor(times).double().numpy(),
            rtol=rtol,
            atol=atol,
            **options,
        )
    path = torch.from_numpy(result.y.T.copy())  # (T, D)
    # LSODA reports success on the way to infinity.
    num_finite = int(path.isfinite().all(-1).cumprod(0).sum())
    path, reached = path[:num_finite], torch.from_numpy(result.t)[:num_finite]
    trajectory = Trajectory(reached, unpack(path), result.nfev)
    if not result.success or num_finite < len(result.t):
        last = f"{float(reached[-1]):.3g}" if num_finite else "the start"
        reason = "From there on the states are not finite." if result.success else result.message
        raise IntegrationError(
            f"solve_ivp(method={method!r}) did not get to time {duration:g}, only to {last}: {reason} Look at the "
            f"velocity there, loosen rtol={rtol:g} and atol={atol:g}, or choose another method.",
            trajectory,
        )
    return trajectory
