"""Tests of a solver as a value, and of its ``init`` and ``step``."""

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from solvers._solve import solve
from solvers.methods.solver import Solver, State
from solvers.testing.conformance._base import ConformanceTests, Counted, require
from solvers.testing.row_contractions import RowContractions

DECORATE = "Derive the class from solvers.Solver and put @dataclasses.dataclass(frozen=True, kw_only=True) above it."


class StepTests(ConformanceTests):
    """A solver is a frozen value that keeps nothing; its states hold an iterate and its image."""

    def test_hyperparameters_are_a_frozen_value(self) -> None:
        """A solver is a frozen, keyword-only dataclass, which is hashable and compares by value."""
        solver = getattr(self, "solver", None)
        require(
            isinstance(solver, Solver),
            f"Set `solver = YourSolver(...)` in the test class, where YourSolver is derived from solvers.Solver; got "
            f"{solver!r}.",
        )
        parameters = vars(type(self.solver)).get("__dataclass_params__")
        require(
            parameters is not None and parameters.frozen,
            f"{self._yours} is of a class that is not itself a dataclass, or not a frozen one. {DECORATE}",
        )
        fields = [field for field in dataclasses.fields(self.solver) if field.init]  # type: ignore[arg-type]
        positional = [field.name for field in fields if not field.kw_only]
        require(not positional, f"{self._yours} has positional hyperparameters, {positional}. {DECORATE}")
        again = type(self.solver)(**{field.name: getattr(self.solver, field.name) for field in fields})
        require(again == self.solver, f"{self._yours} differs from {again!r}, which has the same hyperparameters.")
        try:
            same_hash = hash(again) == hash(self.solver)
        except TypeError as error:
            raise AssertionError(f"{self._yours} is not hashable: {error}. Use tuples instead of lists.") from error
        require(same_hash, f"{self._yours} and one with the same hyperparameters have different hashes.")

    def test_can_be_copied_and_pickled(self) -> None:
        """Copies and pickles are equal to the solver."""
        try:
            unpickled = pickle.loads(pickle.dumps(self.solver))
        except (AttributeError, TypeError, pickle.PickleError) as error:
            raise AssertionError(
                f"{self._yours} cannot be pickled: {error}. Define its class and the functions that it holds at the "
                "top level of a module."
            ) from error
        for how, twin in (("copy.deepcopy", copy.deepcopy(self.solver)), ("pickle", unpickled)):
            require(twin == self.solver, f"{self._yours} comes back from {how} as {twin!r}, which is not equal to it.")

    def test_init_evaluates_the_map_once(self) -> None:
        """``init`` calls the map once, and its state holds the start and the image of the start, bit for bit."""
        problem = RowContractions.make()
        f = Counted(problem)
        z0 = problem.shift.flip(1)
        state = self.solver.init(f, z0.clone())
        require(f.calls == 1, f"{self._yours} calls f {f.calls} times in init, but it must call f once.")
        self._require_true_state(state, problem, "init")
        require(torch.equal(state.z, z0), f"{self._yours} does not begin at z0: init must return z=z0, fz=f(z0).")

    def test_step_keeps_iterate_and_image_together(self) -> None:
        """After every step, ``fz`` equals f(z) bit for bit, and ``z`` and ``fz`` of the state before are unchanged."""
        problem = RowContractions.make()
        f = Counted(problem)
        state = self.solver.init(f, problem.start)
        for number in range(2, 9):
            held = [(tensor, tensor.clone()) for tensor in (state.z, state.fz)]
            calls = f.calls
            with torch.no_grad():
                state = self.solver.step(f, state)
            where = f"step {number} (init is the first)"
            require(
                self.calls_per_step in (None, f.calls - calls),
                f"{self._yours} calls f {f.calls - calls} times in {where}, where {self.calls_per_step} are expected. "
                "If this is intended, set calls_per_step in the test class, to None if it varies.",
            )
            self._require_true_state(state, problem, where)
            require(
                all(torch.equal(tensor, before) for tensor, before in held),
                f"{self._yours} writes into the z or fz of the given state in {where}. They belong to the caller and "
                "to f, so create new tensors. All other tensors of your state may be changed in place.",
            )

    def test_nothing_is_kept_on_the_solver(self) -> None:
        """Two solves that take turns proceed like each of them alone."""
        problems = [RowContractions.make(), RowContractions.make(batch=3, size=5, slowest=0.5)]
        alone = [self._iterates(problem, problem.start, 8) for problem in problems]
        states: list[Any] = [self.solver.init(problem, problem.start) for problem in problems]
        for number in range(2, 9):
            states = [self.solver.step(f, state) for f, state in zip(problems, states, strict=True)]
            for state, iterates in zip(states, alone, strict=True):
                require(
                    torch.equal(state.z, iterates[number - 1][0]),
                    f"{self._yours} takes a different step {number} when a second solve runs in between. Keep what a "
                    "solve remembers in its State, not on the solver, its class or the module.",
                )

    def test_a_solve_can_be_repeated(self) -> None:
        """A repeated solve gives the same bits, even after a solve of another shape."""
        problem, other = RowContractions.make(), RowContractions.make(batch=2, size=3)
        first = self._solve(problem, problem.start)
        self._solve(other, other.start)
        second = self._solve(problem, problem.start)
        require(
            torch.equal(first.value, second.value) and torch.equal(first.num_steps, second.num_steps),
            f"{self._yours} gives a different answer to the same problem the second time. It must not keep anything "
            "after a solve or draw random numbers from the global generator.",
        )

    def test_inputs_are_not_changed(self) -> None:
        """The solver does not write into the start or into a tensor that the map returns."""
        problem = RowContractions.make()
        z0 = problem.shift + 1
        before = z0.clone()
        with torch.no_grad():
            self._solve(problem, z0)
        require(
            torch.equal(z0, before), f"{self._yours} writes into z0. Create new tensors: z = z + ..., not z += ...."
        )
        image = problem.shift.clone()
        with torch.no_grad():
            solve(lambda z: image, z0, self.solver, rtol=None, atol=None, max_steps=4)
        require(
            torch.equal(image, problem.shift),
            f"{self._yours} writes into the tensor that f returned, which f may still use. Create new tensors.",
        )

    def _require_true_state(self, state: Any, f: RowContractions, where: str) -> None:
        __tracebackhide__ = True
        require(
            isinstance(state, State),
            f"{self._yours} returns a {type(state).__name__} from {where}; it must be a solvers.State or of a class "
            "derived from it.",
        )
        for name, tensor in (("z", state.z), ("fz", state.fz)):
            require(
                isinstance(tensor, Tensor) and tensor.shape == f.shift.shape and tensor.dtype == f.shift.dtype,
                f"{self._yours} returns a state from {where} whose {name} is not like the start, which has the shape "
                f"{tuple(f.shift.shape)} and dtype {f.shift.dtype}: {tensor!r}",
            )
        for name, tensor in tensors_of(state, "state"):
            require(
                tensor.dim() > 0 and tensor.shape[0] == len(f.shift),
                f"{self._yours} returns a state from {where} with {name} of shape {tuple(tensor.shape)}. The first "
                f"dimension of every tensor in a state must be that of the {len(f.shift)} samples, so that finished "
                "samples can be taken out. Store a value that all samples share as a Python number.",
            )
        image = f(state.z)
        require(
            torch.equal(state.fz, image),
            f"{self._yours} returns a state from {where} whose fz is not f(z): they differ by up to "
            f"{float((state.fz - image).abs().max()):.1e}. The driver tests convergence on them, so fz must be exactly "
            "the result of calling f with z.",
        )


def tensors_of(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors in a dataclass and in the dataclasses within it, with their names."""
    __tracebackhide__ = True
    if isinstance(state, Tensor):
        yield name, state
    elif dataclasses.is_dataclass(state):
        for field in dataclasses.fields(state):
            yield from tensors_of(getattr(state, field.name), f"{name}.{field.name}")
    else:
        require(
            not any(isinstance(leaf, Tensor) for leaf in tree_leaves(state)),
            f"{name} holds tensors in a {type(state).__name__}, where the driver does not find them when finished "
            "samples leave the batch. Give each a field of its own, or stack them: (B, n, D).",
        )
