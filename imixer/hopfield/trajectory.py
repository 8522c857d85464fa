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
        RuntimeError: The integrator gave up, or the velocity is not finite.
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

    def right_hand_side(time: float, flat: Any) -> Any:
        flow = flat_velocity(torch.from_numpy(flat))
        # Some of the methods never come back from a nan.
        if not flow.isfinite().all():
            raise RuntimeError(f"The velocity at time {time:.3g} is not finite, integrating by {method!r}.")
        return flow.numpy()

    options: dict[str, Any] = {}
    if method in ("Radau", "BDF", "LSODA"):  # those that use a Jacobian
        jacobian = torch.func.jacrev(flat_velocity)
        options["jac"] = lambda _, flat: jacobian(torch.from_numpy(flat)).numpy()
    with torch.no_grad():
        result = solve_ivp(
            right_hand_side,
            (0.0, duration),
            torch.cat([x.flatten() for x in start]).numpy(),
            method=method,
            t_eval=None if times is None else torch.as_tensor(times).double().numpy(),
            rtol=rtol,
            atol=atol,
            **options,
        )
    if not result.success:
        last = result.t[-1] if len(result.t) else 0.0
        raise RuntimeError(
            f"solve_ivp(method={method!r}) did not get to time {duration:g}, the last state is that at {last:.3g}: "
            f"{result.message} Look at the velocity there, loosen rtol={rtol:g} and atol={atol:g}, or choose another "
            "method."
        )
    return Trajectory(torch.from_numpy(result.t), unpack(torch.from_numpy(result.y.T.copy())), result.nfev)
