"""Roots of a batch of systems: the short way for samples that full Newton steps solve, and the batch in parts."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers import _compiled as compiled
from solvers._branch_free import Limits
from solvers._failure import report_failure
from solvers._full_steps import FullSteps, Reached, judged_again
from solvers._graph import LimitedTask
from solvers._measure import Measure
from solvers._registry import get_solver
from solvers._solution import Solution, Status
from solvers._solve import Iteration, advice_on
from solvers._stopping import Stopping, StopRule
from solvers.methods.newton import Newton
from solvers.methods.root_map import RootMap
from solvers.methods.solver import Solver
from solvers.problem import (
    InDims,
    Layout,
    OnFailure,
    S,
    Traceable,
    check_compile,
    check_on_failure,
    checked_int,
    without_autocast,
)


def solve_root(
    F: Callable[..., Any],  # noqa: N803
    z0: S,
    solver: Solver | str = "newton",
    *,
    args: tuple[Any, ...] = (),
    stopping: StopRule = Stopping(),  # noqa: B008
    batch_dims: int = 1,
    history: bool = False,
    compact: bool = False,
    in_dims: InDims = 0,
    chunk_size: int | None = None,
    compile: bool = False,
    on_failure: OnFailure = "warn",
    what: str = "The root solve",
) -> Solution[S]:
    """Find ``F(z, *args) = 0`` for a batch of independent systems, without gradients; see :func:`implicit.root`.

    Args:
        F: The function, taking the state and ``args``, and returning something like the state.
        z0: The start: a tensor or a pytree of tensors, real floating point.
        solver: A solver or its name.
        args: Further arguments of ``F``.
        stopping: When to stop.
        batch_dims: How many leading dimensions of the state index independent systems; 0 is one system.
        history: Keep the residual of every step.
        compact: Take finished samples out of the call of ``F``.
        in_dims: With ``compact`` or ``chunk_size``, which dimension of each of ``args`` indexes the samples.
        chunk_size: Solve so many samples at a time, whose intermediate results then fit into the cache or the memory.
        compile: Run the loop of the solve as one graph of ``torch.compile``, as :func:`solvers.solve` does; of
            ``Newton``, the full steps, after which samples that need shorter ones go on step by step.
        on_failure: "warn", "raise" or "ignore".
        what: What is solved, as the beginning of a message.

    Returns:
        The :class:`Solution`. Its ``state`` is None where it was put together from parts.

    Raises:
        ConvergenceError: A sample failed and ``on_failure="raise"``.
        TypeError, ValueError: The state, an option or what ``F`` returns is not valid.

    Example:
        >>> import torch
        >>> from solvers import solve_root
        >>> solve_root(lambda z, x: z**3 - x, torch.ones(2, 1), args=(torch.tensor([[8.0], [27.0]]),)).value.flatten()
        tensor([2., 3.])
    """
    check_on_failure(on_failure)
    number = None if chunk_size is None else checked_int("chunk_size", chunk_size, or_else=" or None")
    check_compile(compile, compact=compact)
    batch = _Batch(F, z0, args, batch_dims, in_dims, compact=compact, chunk_size=number)
    solver, stopping = get_solver(solver), stopping.resolved(batch.eps)
    iteration = functools.partial(Iteration, solver=solver, stopping=stopping, history=history, root=True)
    if batch.takes_full_steps(solver, stopping, history):
        batch.take_full_steps(stopping, compile=compile)
    else:
        iteration.keywords["compile"] = compile and not batch.is_empty
    if batch.is_whole:
        whole: Iteration[S] = iteration(F, z0, args=args, batch_dims=batch_dims, compact=compact, in_dims=in_dims)
        return whole.run(on_failure, what=what)
    batch.solve_rest(iteration)
    solution: Solution[S] = batch.solution()
    goal = stopping.tolerances if isinstance(stopping, Stopping) else ""
    report_failure(solution, on_failure, what, goal=goal, advice=batch.advice)
    return solution


class _Batch:
    """The systems of a batch, solved in parts, and what has become of them."""

    def __init__(
        self,
        F: Callable[..., Any],  # noqa: N803
        z0: Any,
        args: tuple[Any, ...],
        batch_dims: int,
        in_dims: InDims,
        *,
        compact: bool,
        chunk_size: int | None,
    ) -> None:
        self._layout = Layout(z0, batch_dims)
        self._F, self._args, self._in_dims, self._compact = F, args, in_dims, compact
        self._map = RootMap(F, args, self._layout)
        # Whether samples can be taken out of the arguments.
        self._separable = compact or chunk_size is not None
        if self._separable:
            if batch_dims != 1:
                option = "compact=True" if chunk_size is None else "chunk_size"
                raise ValueError(f"{option} needs batch_dims=1, so that samples can leave the batch; got {batch_dims}.")
            self._map.check_in_dims(in_dims)
        self._z0 = self._layout.pack(z0).contiguous()
        self._chunk_size = len(self._z0) if chunk_size is None else chunk_size
        self._num_evals = 0
        # What full steps have reached, and the norms in which it is judged.
        self._reached: Reached | None = None
        self._limit = torch.empty(0)
        self._measure: Measure | None = None
        # What is known of the samples, flat; and which of them are not solved yet.
        self._found: dict[str, Tensor] = {}
        self._rest = torch.arange(len(self._z0), device=self._z0.device)
        self._states: list[Any] = []
        self._histories: list[Tensor] = []

    @property
    def eps(self) -> float:
        """The relative rounding error of the function."""
        return self._map.eps

    @property
    def is_empty(self) -> bool:
        """Whether there are no samples."""
        return not len(self._z0)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is solved yet, and the batch is to be solved at once."""
        return len(self._rest) == len(self._z0) <= self._chunk_size

    def takes_full_steps(self, solver: Solver, stopping: StopRule, history: bool) -> bool:
        """Whether :class:`FullSteps` can take the steps of this solve that it is made for."""
        if not isinstance(solver, Newton) or not isinstance(stopping, Stopping) or stopping.check_every > 1:
            return False
        size, number = self._z0.shape[1], len(self._z0)
        if history or torch.compiler.is_compiling() or not Measure(stopping, self._layout).is_of_whole:
            return False
        return 0 < size <= solver.max_unknowns and number > 0

    @torch.no_grad()
    def take_full_steps(self, stopping: StopRule, *, compile: bool) -> None:
        """Solve the samples for which full Newton steps suffice."""
        assert isinstance(stopping, Stopping)
        reached, number, norms, statuses = Reached.nothing(self._z0), len(self._z0), [], []
        self._measure = measure = Measure(stopping, self._layout)
        with without_autocast(self._layout.device.type):
            for start in range(0, number, self._chunk_size):
                f, part = copy.copy(self._map), reached
                if number > self._chunk_size:
                    rows = range(start, min(start + self._chunk_size, number))
                    part = reached.part(rows.start, rows.stop)
                    f.take_samples(rows, self._in_dims)
                of_all = copy.copy(f)
                if not start:
                    f.residual(part.value)  # once without a transform, in which what F brings along is not found
                done = self._compiled_full_steps(f, part, stopping) if compile else None
                if done is None:
                    compile = False
                    steps = FullSteps(f, part, self._layout, stopping, self._in_dims, compact=self._separable)
                    steps.run()
                change, limit = done or (torch.full_like(part.residual, math.nan), steps.limit)
                limit = limit.masked_fill(part.num_steps == 0, math.inf)
                status = torch.full_like(part.num_steps, Status.CONVERGED, dtype=torch.int8)
                if self._separable or bool((part.num_steps > 0).all()):  # or else when the others are solved as well
                    change = measure.norm(of_all.residual(part.value)) if done is None else change
                    status = judged_again(of_all, measure, part, change, limit)
                norms.append((change, limit))
                statuses.append(status)
                self._num_evals += f.num_evals + of_all.num_evals
        self._reached = reached
        self._found = {name: getattr(reached, name) for name in ("value", "num_steps", "residual", "error_estimate")}
        change, self._limit = map(torch.cat, zip(*norms, strict=True))
        self._found |= {"change": change, "status": torch.cat(statuses)}
        self._rest = (reached.num_steps == 0).nonzero().squeeze(1)

    def _compiled_full_steps(self, f: RootMap, part: Reached, stopping: Stopping) -> tuple[Tensor, Tensor] | None:
        """The full steps of the samples of ``f`` in one graph; returns the norm of F after them, and its limit.

        None if that cannot be.
        """
        measure = Measure(stopping, self._layout, root=True)
        task = LimitedTask(
            f=self._F.traced() if isinstance(self._F, Traceable) else self._F,
            z0=f.layout.unpack(part.value),
            args=f.args,
            batch_dims=len(f.layout.batch_shape),
            autocast=f.autocast,
            limits=Limits.of(stopping, measure, part.value, eps=f.eps, remembers=False),
        )
        done = compiled.reach(task, part.value)
        if done is None:
            return None
        reached, change, limit, step = done
        for field in dataclasses.fields(part):
            getattr(part, field.name).copy_(getattr(reached, field.name))
        f.num_evals += step + 1
        return change, limit

    def solve_rest(self, iteration: Callable[..., Iteration[Any]]) -> None:
        """Solve the samples that are left by the driver loop, ``iteration`` of a function, a start and options."""
        for rows in self._rest.split(self._chunk_size) if len(self._rest) else ():
            layout = self._layout.resized(len(rows))
            z0 = layout.unpack(self._z0.index_select(0, rows))
            if self._separable:
                args, in_dims = self._map.args_of(rows, self._in_dims), self._in_dims
                solution = iteration(self._F, z0, args=args, compact=self._compact, in_dims=in_dims).run("ignore")
            else:
                solution = iteration(self._among_all(rows, layout), z0, args=self._args).run("ignore")
            self._num_evals += solution.num_evals
            self._states.append(solution.state)
            if solution.history is not None:  # then the parts are the chunks, in their order
                self._histories.append(solution.history)
            self._take_in(rows, dataclasses.replace(solution, value=layout.pack(solution.value)))
        if self._reached is not None and not self._separable and len(self._rest):
            self._judge_again(self._reached)

    @torch.no_grad()
    def _judge_again(self, reached: Reached) -> None:
        """Judge what full steps have reached by F at the values of all samples."""
        assert self._measure is not None
        f, found = copy.copy(self._map), self._found
        with without_autocast(self._layout.device.type):
            found["change"] = self._measure.norm(f.residual(found["value"]))
            status = judged_again(f, self._measure, reached, found["change"], self._limit)
        found["status"] = torch.maximum(found["status"], status)
        self._num_evals += f.num_evals

    def _among_all(self, rows: Tensor, layout: Layout) -> Callable[..., Any]:
        """F for only the samples ``rows`` (n,), called with all: the others stay where they are."""
        whole, of_whole, F = self._found["value"], self._layout, self._F  # noqa: N806

        def of_some(z: Any, *args: Any) -> Any:
            image = F(of_whole.unpack(whole.index_copy(0, rows, layout.pack(z))), *args)
            of_whole.check(image, self._map.called)
            return layout.unpack(of_whole.pack(image).index_select(0, rows))

        return of_some

    def _take_in(self, rows: Tensor, solution: Solution[Tensor]) -> None:
        """Take in the solution, with a flat value, of the samples ``rows`` (n,)."""
        for name in ("value", "status", "residual", "error_estimate", "num_steps", "change"):
            part = getattr(solution, name)
            if part is None:
                continue
            if name not in self._found:
                self._found[name] = part.new_zeros(len(self._z0), *part.shape[1:])
            self._found[name].index_copy_(0, rows, part)

    def advice(self) -> str:
        """What may be wrong with F."""
        with torch.no_grad():
            return advice_on(self._map, self._states, self._found["value"], self._layout.batch_shape)

    def solution(self) -> Solution[Any]:
        """The solution of the batch."""
        found: dict[str, Any] = {"residual": None}
        found |= {name: self._layout.unpack_batch(part) for name, part in self._found.items() if name != "value"}
        if self._histories:  # a sample that has stopped repeats its residual
            length = max(map(len, self._histories))
            longest = [torch.cat((part, part[-1:].expand(length - len(part), -1))) for part in self._histories]
            found["history"] = torch.cat(longest, dim=1)
        return Solution(value=self._layout.unpack(self._found["value"]), num_evals=self._num_evals, **found)
