"""Solves that are accurate enough for their gradient to be called exact, and how each of them went."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from implicit.autograd.constant_weights import constant_weights
from implicit.autograd.torch_internals import transform_active
from implicit.backward import Implicit, Unrolled
from implicit.diagnostics.layer_report import count_statuses
from implicit.diagnostics.map_check import map_problems
from implicit.diagnostics.replay import Replay, Setting
from implicit.diagnostics.solve_hook import SolveCall
from implicit.diagnostics.trials import SOLVERS, SOLVERS_OF_ROOTS
from solvers import NewtonKrylov, Solution, Status, Steps, Stopping
from solvers.linear import GMRES

# How much smaller than those of a solve the tolerances of its reference are.
_FACTOR = 1e-3
# Rounding may keep a reference from its tolerances. It is accepted where its residual is this part of the solve's own.
_ACCEPTED = 0.1


@dataclasses.dataclass
class _Reference:
    """A solve whose gradient is needed, with the residual at which one that rounding has ended is accepted."""

    name: str
    solution: Solution[Any]
    accepted: float


class ReferenceSolves:
    """Makes solves whose gradient is exact, and finds out of which of them it is not.

    For a fixed number of steps of a solver that gradients flow through, that is the gradient of these steps. Any other
    solve, and its adjoint, is solved a thousand times as accurately as asked for, as far as the dtype allows. Where the
    solve's own solver does not get so far, others are tried: from the same start, or from where the solver got to if
    that meets the tolerances of the solve itself.

    Attributes:
        fixed: By the name of each solve, whether it takes a fixed number of steps.
    """

    def __init__(self) -> None:
        self.fixed: dict[str, bool] = {}
        self._made: list[_Reference] = []
        self._problems: dict[str, tuple[str, ...]] = {}

    def __call__(self, call: SolveCall) -> Solution[Any]:
        options = dataclasses.replace(call.options, on_failure="ignore", compile=False)
        rule = options.stopping
        self.fixed[call.name] = isinstance(rule, Steps) and options.solver.differentiable
        if self.fixed[call.name]:
            return dataclasses.replace(call, mode=Unrolled(), options=options).solve()
        if isinstance(rule, Steps):
            rule = Stopping(max_steps=max(rule.max_steps, 50))
        eps = max(torch.finfo(leaf.dtype).eps for leaf in tree_leaves(call.z0))
        own = rule.relative or 10 * eps / _FACTOR  # where atol alone is given, it decides
        rule = dataclasses.replace(
            rule,
            rtol=max(_FACTOR * own, 10 * eps),
            atol=tree_map_only((int, float), lambda atol: _FACTOR * atol, rule.atol),
            max_steps=4 * rule.max_steps,
        )
        call = dataclasses.replace(
            call,
            mode=Implicit(linear_solver=GMRES(restart=50, max_steps=500)),
            options=dataclasses.replace(options, stopping=rule),
        )
        if transform_active():  # a solve within a map that is being differentiated
            return call.solve()
        if call.name not in self._problems:
            self._problems[call.name] = () if options.root else _problems_of(call)
        if not self._problems[call.name]:
            call = _solved(call, own)
        solution = call.solve()
        if torch.is_grad_enabled():
            self._made.append(_Reference(call.name, solution, _ACCEPTED * own))
        return solution

    def unsolved(self) -> dict[str, tuple[str, ...]]:
        """Return why the gradient is not exact, by the names of the solves of which it is not.

        Call it after the backward pass.
        """
        found: dict[str, dict[str, None]] = {}
        for reference in self._made:
            reasons = found.setdefault(reference.name, dict.fromkeys(self._problems.get(reference.name, ())))
            reasons.update(dict.fromkeys(_failures(reference)))
        return {name: tuple(reasons) for name, reasons in found.items() if reasons}


def _problems_of(call: SolveCall) -> tuple[str, ...]:
    """Why the map cannot be solved for a fixed point: it changes from call to call, or mixes samples."""
    try:
        return tuple(p.message for p in map_problems(call.f, call.z0, call.args, call.options.batch_dims))
    except Exception:  # the map refuses states near the start, at which it is called
        return ()


def _solved(call: SolveCall, own: float) -> SolveCall:
    """The call with a start at the solution and the solver that found it; as it is if none does."""
    replay = Replay(call.f, call.z0, call.args, call.mode, call.options, "z0")
    layout, start = replay.layout, replay.start
    for solver in dict.fromkeys((call.options.solver, *(SOLVERS_OF_ROOTS if call.options.root else SOLVERS))):
        steps = call.options.max_steps
        if solver != call.options.solver:
            # A step of Newton-Krylov is up to 40 products, and where it converges it takes few of them.
            steps = 50 if isinstance(solver, NewtonKrylov) else max(steps, 200)
        try:
            with torch.no_grad(), constant_weights(), replay.restored():
                solution = replay.run(Setting(solver=solver, max_steps=steps, start=("z0", layout.unpack(start))))
        except Exception:  # products that the map does not support, or a state that it refuses
            continue
        good = _is_solved(solution, _ACCEPTED * own)
        near = good if solution.residual is None else good | (solution.residual.flatten() <= own)
        start = torch.where(near.unsqueeze(1), layout.pack(solution.value), start)
        if bool(good.all()):
            options = dataclasses.replace(call.options, solver=solver)
            return dataclasses.replace(call, z0=layout.unpack(start), options=options)
    return call


def _is_solved(solution: Solution[Any], accepted: float) -> Tensor:
    """(B,) bool, flat."""
    status, residual = solution.status.flatten(), solution.residual
    done = (status == Status.CONVERGED) | (status == Status.PRECISION_FLOOR) | (status == Status.UNTESTED)
    if residual is None:
        return done
    return done | ((status == Status.STAGNATED) & (residual.flatten() <= accepted))


def _failures(reference: _Reference) -> Iterator[str]:
    solution = reference.solution
    for what, solved in (("the solve", solution), ("its adjoint", solution.adjoint)):
        if solved is None:
            continue
        bad = ~_is_solved(solved, reference.accepted)
        for name, count in count_statuses(solved.status.flatten()[bad].cpu()).items():
            yield f"{what}: {count} of {bad.numel()} samples {name}"
