"""Calls of a function around every solve that a model makes: of its implicit layers, and of fixed_point and root."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import nn

from implicit.backward import Backward, SolveOptions
from implicit.functional import Solve, solve_in_force, solve_unobserved
from implicit.implicit_layer import ImplicitLayer, running_modules
from solvers import ConvergenceError, Solution


@dataclasses.dataclass(frozen=True)
class SolveCall:
    """A solve that a model is about to make.

    Attributes:
        name: What it is called.
        f: The map, or the function whose root is wanted.
        z0: The start.
        args: Further arguments of ``f``.
        mode: The backward mode.
        options: How it is solved.
        owner: The layer whose solve it is, or the function of a call.
        outer: What else is in force around it, or None.
    """

    name: str
    f: Callable[..., Any]
    z0: Any
    args: tuple[Any, ...]
    mode: Backward
    options: SolveOptions
    owner: object
    outer: Solve | None

    def solve(self) -> Solution[Any]:
        """Make it as it would be made without being looked at."""
        if self.outer is None:
            return solve_unobserved(self.f, self.z0, self.args, self.mode, self.options)
        return self.outer(self.f, self.z0, self.args, self.mode, self.options, self.owner)


Around = Callable[[SolveCall], Solution[Any]]


class SolveNames:
    """The names of a model's solves: that of the implicit layer, or the module and function of a call in its forward.

    Calls of :func:`implicit.fixed_point` and :func:`implicit.root` are told apart by the module in whose methods they
    are made and by the function that they solve: ``"head: root of kepler"``, or ``"root of kepler"`` for the model
    itself. A second function of the same name in the same module is ``"head: root of kepler (2)"``.

    Attributes:
        layers: The implicit layers by their names.
        seen: The names of the solves so far, and the modules that these belong to.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"The model must be a torch.nn.Module, got {model!r}. For a map f, pass implicit.FixedPointLayer(f)."
            )
        self._model = model
        self._modules = {module: name for name, module in model.named_modules()}
        self._calls: dict[Hashable, str] = {}
        self.layers = {name: layer for layer, name in self._modules.items() if isinstance(layer, ImplicitLayer)}
        self.seen: dict[str, str] = {}

    def name(self, owner: object, options: SolveOptions) -> str | None:
        """Return the name of the solve that is being made; None if it is not one of the model's."""
        if isinstance(owner, ImplicitLayer):
            module = name = self._modules.get(owner)
        else:
            module = self._running()
            name = None if module is None else self._name_of_call(module, owner, options.root)
        if name is not None and module is not None:
            self.seen.setdefault(name, module)
        return name

    def in_order(self) -> tuple[str, ...]:
        """Return the names seen: first the layers in the model's order, then the calls in theirs."""
        return tuple(dict.fromkeys((*(name for name in self.layers if name in self.seen), *self.seen)))

    def place_of(self, name: str) -> str:
        """Return what a solve is called in tables: its name, and the types of the modules that it belongs to."""
        module = self._model.get_submodule(self.seen[name])
        kind = type(module).__name__
        if name not in self.layers:
            return f"{name} (in {kind})"
        parent = self._model.get_submodule(name.rpartition(".")[0])
        if parent is not module and not type(parent).__module__.startswith("torch."):
            kind += f" of {type(parent).__name__}"
        return f"{name or 'the model'} ({kind})"

    def require_solves(self) -> None:
        """Raise a ValueError if no solve has been seen."""
        if self.seen:
            return
        if self.layers:
            raise ValueError(f"None of the implicit layers {list(self.layers)} made a solve in this call of the model.")
        raise ValueError(
            f"{type(self._model).__name__} has no implicit layer (FixedPointLayer, InvertibleResidual or iMLP), and "
            "its forward pass called neither implicit.fixed_point nor implicit.root in the thread that looks at it. "
            "For a map f that is solved elsewhere, as by solvers.solve, pass implicit.FixedPointLayer(f, ...)."
        )

    def _running(self) -> str | None:
        """The name of the innermost module of the model that is running in this thread."""
        return next((self._modules[owner] for owner in running_modules() if owner in self._modules), None)

    def _name_of_call(self, module: str, f: object, root: bool) -> str:
        function, text = self._described(f)
        key = (module, root, function)
        if key not in self._calls:
            name = f"{module}{': ' if module else ''}{'root' if root else 'fixed point'} of {text}"
            number = 1 + sum(known.partition(" (")[0] == name for known in self._calls.values())
            self._calls[key] = name if number == 1 else f"{name} ({number})"
        return self._calls[key]

    def _described(self, f: object) -> tuple[Hashable, str]:
        """What tells a function from others, also where each call makes it anew, and what it is called."""
        while isinstance(f, functools.partial):
            f = f.func
        if isinstance(f, nn.Module):
            kind, name = type(f), self._modules.get(f)
            return kind.__qualname__ if name is None else name, name or kind.__name__
        text: str = getattr(f, "__name__", type(f).__name__)
        return getattr(f, "__code__", text), text


@contextlib.contextmanager
def around_solves(names: SolveNames, around: Around, *, alone: bool = False) -> Iterator[None]:
    """Within the context, let ``around(call)`` make every solve of the model.

    ``call.solve()`` makes it as it would be made without; if ``alone`` is True, unseen by contexts around this one.
    Solves of other threads, and within graphs of ``torch.compile``, are left alone.
    """
    outer = None if alone else solve_in_force.get()

    def make(
        f: Callable[..., Any],
        z0: Any,
        args: tuple[Any, ...],
        mode: Backward,
        options: SolveOptions,
        owner: object,
    ) -> Solution[Any]:
        name = names.name(owner, options)
        call = SolveCall(name or "", f, z0, args, mode, options, owner, outer)
        return call.solve() if name is None else around(call)

    token = solve_in_force.set(make)
    try:
        yield
    finally:
        solve_in_force.reset(token)


Observe = Callable[[str, Solution[Any]], None]


@contextlib.contextmanager
def observed_solves(names: SolveNames, observe: Observe, *, history: bool = False) -> Iterator[None]:
    """Within the context, call ``observe(name, solution)`` after every solve of the model, also one that raises.

    If ``history`` is True, the solutions have their histories.
    """

    def around(call: SolveCall) -> Solution[Any]:
        if history:
            call = dataclasses.replace(call, options=dataclasses.replace(call.options, history=True))
        try:
            solution = call.solve()
        except ConvergenceError as error:
            observe(call.name, error.solution)
            raise
        observe(call.name, solution)
        return solution

    with around_solves(names, around):
        yield
