"""How an iMLP solves for its fixed point: what its options mean for the layers that solve."""

import math
from typing import Any

from imixer.imlp_options import IMLPOptions
from implicit import JFB, Backward, Implicit, Phantom, Unrolled, get_backward
from solvers import NewtonKrylov, Picard, Solver, Steps, Stopping, StopRule, get_solver
from solvers.linear import NeumannSeries

# The error of an inner solve is noise in the map of the outer one, which has to be well below that one's tolerance.
_INNER_RTOL = 0.1


def layer_arguments(options: IMLPOptions, level: int) -> dict[str, Any]:
    """The arguments of the FixedPointLayer inside so many others."""
    n_iter, rtol = options["n_iter"], options["rtol"]
    stopping: StopRule = Steps(n_iter)
    if rtol is not None:
        stopping = Stopping(rtol=rtol * _INNER_RTOL**level, atol=0.0, max_steps=n_iter)
    return {
        "solver": get_solver(options["solver"]),
        "backward": get_backward(options["backward"]),
        "stopping": stopping,
    }


def is_joint(options: IMLPOptions) -> bool:
    """Whether all hidden layers are solved for at once. With one or two of them, both ways are the same."""
    return options["hidden_solve"] == "joint" and options["hidden_layers"] > 2


def check_solver(options: IMLPOptions) -> None:
    """Check that the solver, the backward mode, the depth and the norm go together.

    Raises:
        TypeError, ValueError: They do not; the message says what to choose instead.
    """
    solver, backward = get_solver(options["solver"]), get_backward(options["backward"])
    backward.check(solver)
    if options["norm"] == "batch_per_step":
        _check_batch_per_step(options, solver, backward)
    hidden_layers = options["hidden_layers"]
    if not is_joint(options):
        if hidden_layers > 3 and isinstance(solver, NewtonKrylov):
            raise ValueError(
                f"{options['solver']!r} differentiates the map by forward mode, which PyTorch cannot do through nested "
                f'solves of {hidden_layers} hidden layers. Use hidden_solve="joint", or another solver.'
            )
        return
    # A call of the joint map takes the gradient of the lowest layer two layers further up.
    needed = math.ceil(hidden_layers / 2)
    if _differentiated_calls(backward) < needed:
        raise ValueError(
            f"backward={options['backward']!r} differentiates too few calls of the joint map to reach the weights of "
            f'all {hidden_layers} hidden layers, which takes {needed}. Use hidden_solve="nested", or the backward mode '
            "with more steps, or Implicit()."
        )


def _check_batch_per_step(options: IMLPOptions, solver: Solver, backward: Backward) -> None:
    fits = {
        "solver": isinstance(solver, Picard),
        "backward": isinstance(backward, Unrolled),
        "rtol": options["rtol"] is None,
        "hidden_layers": options["hidden_layers"] <= 2,
    }
    unfit = ", ".join(f"{name}={value!r}" for name, value in options.items() if not fits.get(name, True))
    if unfit:
        raise ValueError(
            'norm="batch_per_step" makes each training step another map, so that there is no fixed point to solve for '
            'or to differentiate: it needs solver="picard", backward="unrolled", rtol=None and at most two hidden '
            f'layers, got {unfit}. Choose these, or norm="batch", which has the same weights and takes its statistics '
            "once per solve."
        )


def _differentiated_calls(backward: Backward) -> float:
    """How many calls of the map in a row a backward mode follows at most; infinite where it is as many as needed."""
    match backward:
        case JFB():
            return 1
        case Phantom(steps=calls) | Implicit(linear_solver=NeumannSeries(terms=calls)):
            return calls
        case _:
            return math.inf
