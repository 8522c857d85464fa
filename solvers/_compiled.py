"""Loops under ``torch.compile``: those of solves, of full Newton steps and of adjoints, and what is left to the host.

A map is found again by its code: new closures, modules and data of the same kind run what was compiled before, as far
as the guards of ``torch.compile`` allow. What cannot be compiled runs step by step, as without ``compile=True``, and
one warning says why.
"""

import contextlib
import contextvars
import functools
import inspect
import itertools
import threading
import types
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from solvers import _full_steps_graph, _graph, _loop, _series_graph
from solvers._cuda_graph import CaptureError, Replayed
from solvers._failure import warn_caller
from solvers._full_steps import Reached
from solvers._graph import Course, LimitedTask, Plan
from solvers._loop import Loop, R, T
from solvers._stopping import Stopping, StopRule
from solvers.methods.solver import Solver
from solvers.problem import Traced, recorded

# What compiles the loops.
BACKEND = "inductor"

# Compiled loops that are kept, each for one kind of map, solver and state.
MOST_KEPT = 256

# For how many steps a method with unlimited memory gets room at first; then for as many again.
FIRST_ROOM = 8

# A state of more bytes runs step by step on the CPU. A compiled loop saves what every operation costs beside its
# arithmetic, and carries more copies of the state through memory: by benchmarks/compiled.py --shapes, Picard is 2.4
# times as fast with 64 x 256 elements, 1.5 times with 512 x 256, which is the limit, and 0.7 times with 2048 x 256.
MOST_BYTES = 2**19

# Where turns of a loop are captured as CUDA graphs, up to a state of how many bytes. Their time is that of launching
# kernels there.
REPLAYED_ON = ("cuda",)
MOST_REPLAYED_BYTES = 2**24

# What could not be compiled, or captured; it is not tried again.
_refused: set[Hashable] = set()
_not_replayed: set[Hashable] = set()

_numbers = itertools.count()

# How guards on this package's own code begin: on its modules, and on the names of that with the loops. (Later
# torch.compile adds the modules of maps to these names.) And how guards name the libraries that it uses most.
_OWN_CODE = (
    "G['__import_solvers_dot_",
    *(f"G['{name}']" for module in (_loop, _graph, _full_steps_graph, _series_graph) for name in vars(module)),
)
_LIBRARIES = (
    "G['__import_dataclasses']",
    "G['__import_torch_dot_utils_dot__pytree']",
    "__import__('torch').utils._pytree",
)

V = TypeVar("V")


# Settings of ``torch.compile`` for solves. Every Python number of a map becomes part of its graph: otherwise one that
# differs in a second solve is made an input of the graph, and of its loops. Floats among these Inductor does not take
# (PyTorch 2.11 to 2.14), ints not every derivative (2.11). And a module with hooks is not taken for one without.
_SETTINGS = {"specialize_float": True, "specialize_int": True, "skip_nnmodule_hook_guards": False}


def _configured() -> contextlib.AbstractContextManager[object]:
    """A context in which ``torch.compile`` has the settings of solves."""
    from torch._dynamo import config  # which takes a second to import

    return config.patch(_SETTINGS) if _threads_have_settings() else _SHARED


@functools.cache
def _threads_have_settings() -> bool:
    """Whether every thread has settings of its own, as in PyTorch 2.14, or all share them, as in 2.11."""
    from torch._dynamo import config

    before = config.verbose
    contextvars.copy_context().run(setattr, config, "verbose", not before)
    apart: bool = config.verbose == before
    config.verbose = before
    return apart


class _SharedSettings:
    """The same for settings that all threads share: as they were when the last thread has left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._before: dict[str, bool] = {}

    def __enter__(self) -> None:
        from torch._dynamo import config

        with self._lock:
            if not self._num_inside:
                self._before = {name: getattr(config, name) for name in _SETTINGS}
                self._set(_SETTINGS)
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self._set(self._before)

    def _set(self, settings: dict[str, bool]) -> None:
        from torch._dynamo import config

        for name, value in settings.items():
            setattr(config, name, value)


_SHARED = _SharedSettings()


class NotCompiledWarning(UserWarning):
    """``compile=True``, but the solve ran step by step."""


@functools.cache
def writes_in_loops() -> bool:
    """Whether ``torch.while_loop`` may write into tensors that it does not carry; in PyTorch 2.11 it may not."""
    operator = torch.ops.higher_order.while_loop
    return "mutated_arg_indices" in inspect.signature(type(operator).__call__).parameters


def run(plan: Plan, fz0: Tensor) -> tuple[Course, bool, int, int] | None:
    """The solve from its first step, whose image is ``fz0``, to its end.

    Returns:
        The solve, whether samples are active at its end, the number of steps and that of calls; None if it is not
        compiled.
    """
    if _is_large(fz0):
        return None
    limits = plan.limits
    options = (plan.solver, limits.check_every, limits.measure.kind, plan.batch_dims, plan.autocast)
    key = (fz0.device.type, fz0.dtype, fz0.shape[1], options, _kind_of(plan.f))
    return _unless_refused(key, lambda: _run(plan, fz0, key))


def reach(task: LimitedTask, like: Tensor) -> tuple[Reached, Tensor, Tensor, int] | None:
    """What full Newton steps reach, the norm of F and its limit, and the number of steps; None if not compiled.

    Args:
        task: What is solved.
        like: (B, D) something like the state.
    """
    options = ("full steps", task.limits.measure.kind, task.batch_dims, task.autocast)
    key = (like.device.type, like.dtype, like.shape[1], options, _kind_of(task.f))

    def call() -> tuple[Reached, Tensor, Tensor, int]:
        (reached, change, limit), (step,) = _through(_full_steps_graph.LOOP, key, task, like)
        return reached, change, limit, step

    return _unless_refused(key, call)


def series(task: _series_graph.SeriesTask, w: Tensor) -> tuple[_series_graph.Progress, int] | None:
    """Where a series with right-hand sides ``w`` (B, D) ends, and its number of products; None if not compiled."""
    if _is_large(w):
        return None
    key = (w.device.type, w.dtype, w.shape[1], ("adjoint", task.batch_dims, task.autocast), _kind_of(task.f))

    def call() -> tuple[_series_graph.Progress, int]:
        end, (num_products,) = _through(_series_graph.LOOP, key, task, w)
        return end, num_products

    return _unless_refused(key, call, "The linear solve of the gradient")


def _is_large(state: Tensor) -> bool:
    """Whether a state (B, D) is too large to be compiled on its device."""
    # With one unknown a sample the tests are most of the work, for which the loop reads the memory less often: there
    # Picard and Anderson are 2.5 times as fast with 131072 elements, where with four unknowns they are not.
    is_large = state.shape[1] > 1 and state.numel() * state.element_size() > MOST_BYTES
    return is_large and state.device.type == "cpu"


def _unless_refused(key: tuple[Hashable, ...], call: Callable[[], V], what: str = "The solve") -> V | None:
    """What a call of compiled code returns; None, with a warning the first time, if it cannot be compiled."""
    if key in _refused:
        return None
    try:
        with torch.no_grad(), _configured():  # a loop must not write where gradients are recorded
            return call()
    except torch.OutOfMemoryError:  # which is no property of the map
        raise
    except Exception as error:
        _refused.add(key)
        cause = str(error).strip().splitlines()
        warn_caller(
            f"{what} runs step by step although compile=True, because it could not be compiled: "
            f"{type(error).__name__}: {cause[0] if cause else 'no message'}\nA map that is compiled must not decide in "
            "Python by the values of tensors; torch.compile(f, fullgraph=True) shows where it does. Python numbers are "
            "part of the graph: make those that take many values tensors.",
            NotCompiledWarning,
            same=str(key),
        )
        return None


def _run(plan: Plan, fz0: Tensor, key: tuple[Hashable, ...]) -> tuple[Course, bool, int, int]:
    course = None
    while True:
        course, (lost, active, step, num_evals) = _through(_graph.LOOP, key, plan, fz0, run=course)
        if lost:
            course = _graph.recovered(plan, course, _graph.held_map(plan, course.samples), _graph.on_host)
        elif not active or step == int(plan.limits.max_steps):
            return course, bool(active), step, num_evals
        elif plan.solver.room(course.state) is not None:
            course.state = plan.solver.fixed_shape(course.state, room=step)


def _through(loop: Loop[T, R], key: tuple[Hashable, ...], task: T, like: Tensor, run: R | None = None) -> Any:
    """What is made of where a loop ends, and its numbers.

    Args:
        loop: The loop.
        key: Of what kind it is.
        task: What is solved.
        like: (B, D) something like the state, with which the loop starts.
        run: From where the loop goes on, instead of its start.
    """
    is_small = like.numel() * like.element_size() <= MOST_REPLAYED_BYTES
    if is_small and like.device.type in REPLAYED_ON and key not in _not_replayed:
        run, news = _compiled(_loop.start, loop, key)(loop, task, like, run)
        try:
            numbers = _replayed(loop, key, task, run, news)
            return run if loop.end is None else _compiled(_loop.end, loop, key)(loop, task, run), numbers
        except CaptureError:
            _not_replayed.add(key)
    end, numbers = _compiled(_loop.whole, loop, key)(loop, writes_in_loops(), task, like, run)
    return end, numbers.tolist()


def _replayed(loop: Loop[T, R], key: tuple[Hashable, ...], task: T, run: R, news: Tensor) -> list[int]:
    """Take turns until the loop ends, all but the first as a CUDA graph; returns the numbers."""
    first = functools.partial(_compiled(_loop.turn_in_place, loop, key), loop, task, run, news)
    turn: Callable[[], object] = first
    goes_on, *numbers = news.tolist()  # the look at the host
    while goes_on:
        turn()
        goes_on, *numbers = news.tolist()
        if turn is first and goes_on:
            turn = Replayed(first, news.device)
    return numbers


def is_refused(solver: Solver, stopping: StopRule, fz: Tensor, *, confirmed: bool) -> bool:
    """Whether a solve with the first image ``fz`` runs step by step anyway, of which a warning tells.

    Args:
        solver: The solver.
        stopping: When to stop.
        fz: The first image.
        confirmed: Whether Newton's step has to confirm what has converged.
    """
    if not isinstance(stopping, Stopping):
        why = "it takes a fixed number of steps. For one graph of these call it inside torch.compile."
    elif not solver.compiles:
        why = (
            f"{solver!r} has no form whose tensors keep their shapes. Picard, Anderson, and Broyden without a limited "
            "memory or a line search have one, and Newton has one for roots, if all leaves have one tolerance and "
            "check_every is 1."
        )
    elif confirmed:
        why = "roots of so few unknowns are confirmed by Newton's step, whose matrix is not part of the graph."
    elif recorded(fz) and not torch.compiler.is_exporting():
        why = (
            "gradients are recorded through its steps. Call it under torch.no_grad(), or use implicit.fixed_point with "
            "the implicit backward mode, which does not need the steps."
        )
    else:
        return False
    warn_caller(f"The solve runs step by step although compile=True: {why}", NotCompiledWarning, same=why)
    return True


@functools.lru_cache(maxsize=MOST_KEPT)
def _compiled(function: Callable[..., V], loop: Loop[Any, Any], key: tuple[Hashable, ...]) -> Callable[..., V]:
    """A function of loops, compiled for one loop of one kind, whose code it shares with no other.

    ``torch.compile`` keeps what it compiled with the code, tries it in turn, and gives up where that gets long.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)
    options: dict[str, Any] = {"guard_filter_fn": _needed}
    if BACKEND == "inductor":
        from solvers._loop_invariants import InvariantsFirst  # loads PyTorch's compiler

        options["post_grad_custom_pre_pass"] = InvariantsFirst()
        if key[0] == "cpu":
            options["cpp_wrapper"] = True
    return torch.compile(own, fullgraph=True, backend=BACKEND, options=options)


def _needed(guards: Any) -> list[bool]:
    """Which guards to keep: not those on code that does not change, of which there are hundreds."""
    names = (guard.name for guard in guards)
    return [not name.startswith(_OWN_CODE) and not any(library in name for library in _LIBRARIES) for name in names]


def _kind_of(f: Any) -> Hashable:
    """What maps have in common that are the same code: functions by their code, other callables by their types."""
    if isinstance(f, types.FunctionType):
        return f.__code__
    if isinstance(f, types.MethodType):
        return (f.__func__, _kind_of(f.__self__))
    if isinstance(f, functools.partial):
        return (functools.partial, _kind_of(f.func))
    if isinstance(f, types.BuiltinFunctionType):
        return f
    if isinstance(f, Traced):
        return (type(f), *map(_kind_of, filter(callable, vars(f).values())))
    forward = getattr(f, "forward", None)  # which a module may have been given in place of its class's
    if forward is None:
        return (type(f),)
    return (type(f), forward.__func__ if getattr(forward, "__self__", None) is f else _kind_of(forward))
