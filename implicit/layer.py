"""The fixed point of a map as a layer."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, Unpack, overload

import torch
from torch import Tensor, nn

from implicit.backward import Backward
from implicit.implicit_layer import ImplicitLayer
from implicit.solve_keywords import LayerKeywords
from implicit.training.iterates import iterates
from solvers import NOT_GIVEN, NotGiven, Solution, Solver, StopRule, Tolerance, stop_rule
from solvers.problem import InDims, OnFailure, S, names_options, require_callable


class FixedPointLayer(ImplicitLayer, Generic[S]):
    """A layer whose output is the fixed point ``z = f(z, *inputs)``.

    The module form of :func:`implicit.fixed_point`; what is said there of gradients holds here. If ``f`` is a module,
    its parameters are the layer's. Parametrized weights are computed once per forward pass and constant during the
    solve. The options are attributes and can be changed later; a call can have its own stopping.

    Args:
        f: The map, a module or any callable, taking the state and the inputs.
        solver: A solver such as ``Anderson(memory=5)``, or its name.
        backward: A backward mode such as ``Implicit()``, or its name.
        init: Makes the start from the inputs; by default zeros like the first input.
        stopping: When to stop, as in :func:`solvers.solve`: a :class:`solvers.Stopping` or :class:`solvers.Steps`. The
            next four options are a shorthand for it.
        rtol: Relative tolerance; with ``rtol=None, atol=None`` exactly ``max_steps`` steps are taken, untested.
        atol: Absolute tolerance, on the root mean square over a sample's entries.
        max_steps: The largest number of steps.
        check_every: Test for convergence at every so many steps.
        batch_dims: How many leading dimensions of the state index independent problems; 0 is one problem.
        compact: Take finished samples out of the call of ``f``. All that it needs of each sample must then come through
            the inputs.
        in_dims: With ``compact``, which dimension of each input indexes the samples.
        compile: Run the loop of the solve as one compiled graph, as :func:`solvers.solve` does. The attribute is
            ``compiled``, because ``compile`` is a method of all modules.
        on_failure: "warn", "raise" or "ignore".

    Raises:
        TypeError, ValueError: An option is not valid; at construction, not at the first call.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer
        >>> layer = FixedPointLayer(lambda z, x: 0.5 * torch.tanh(z) + x, solver="picard", rtol=1e-6)
        >>> layer(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    if TYPE_CHECKING:
        # nn.Module's __call__ returns Any.
        @overload
        def __call__(
            self,
            *inputs: Any,
            z0: S | None = ...,
            stopping: StopRule | None = ...,
            rtol: Tolerance = ...,
            atol: Tolerance = ...,
            max_steps: int | NotGiven = ...,
            return_solution: Literal[False] = ...,
        ) -> S: ...

        @overload
        def __call__(
            self,
            *inputs: Any,
            z0: S | None = ...,
            stopping: StopRule | None = ...,
            rtol: Tolerance = ...,
            atol: Tolerance = ...,
            max_steps: int | NotGiven = ...,
            return_solution: Literal[True],
        ) -> tuple[S, Solution[S]]: ...

        def __call__(self, *inputs: Any, **options: Any) -> Any: ...

    @overload
    def __init__(
        self: "FixedPointLayer[Tensor]",
        f: nn.Module,
        *,
        init: Callable[..., Tensor] | None = ...,
        **options: Unpack[LayerKeywords],
    ) -> None: ...

    @overload
    def __init__(
        self,
        f: Callable[..., S],
        *,
        init: Callable[..., S] | None = ...,
        **options: Unpack[LayerKeywords],
    ) -> None: ...

    @names_options
    def __init__(
        self,
        f: Callable[..., Any],
        *,
        solver: Solver | str = "anderson",
        backward: Backward | str = "implicit",
        init: Callable[..., Any] | None = None,
        stopping: StopRule | None = None,
        rtol: Tolerance = NOT_GIVEN,
        atol: Tolerance = NOT_GIVEN,
        max_steps: int | NotGiven = NOT_GIVEN,
        check_every: int | NotGiven = NOT_GIVEN,
        batch_dims: int = 1,
        compact: bool = False,
        in_dims: InDims = 0,
        compile: bool = False,
        on_failure: OnFailure = "warn",
    ) -> None:
        require_callable("FixedPointLayer(f)", f)
        if not (init is None or callable(init)):
            raise TypeError(
                f"FixedPointLayer(init=...) must be a callable of the inputs that returns the start, got {init!r}. For "
                "a start that you have, pass z0=... in the call of the layer."
            )
        super().__init__(
            solver=solver,
            backward=backward,
            stopping=stop_rule(stopping, rtol=rtol, atol=atol, max_steps=max_steps, check_every=check_every),
            batch_dims=batch_dims,
            compact=compact,
            in_dims=in_dims,
            compile=compile,
            on_failure=on_failure,
        )
        self.f = f
        self.init = init

    @names_options
    def forward(
        self,
        *inputs: Any,
        z0: Any = None,
        stopping: StopRule | None = None,
        rtol: Tolerance = NOT_GIVEN,
        atol: Tolerance = NOT_GIVEN,
        max_steps: int | NotGiven = NOT_GIVEN,
        return_solution: bool = False,
    ) -> Any:
        """The fixed point for these inputs.

        Args:
            *inputs: Handed to ``f`` after the state.
            z0: A warm start, like the state; by default ``init(*inputs)``, or zeros like the first input.
            stopping: In place of the layer's own, for this call.
            rtol: In place of that of the layer's stopping, as are the next two.
            atol: Absolute tolerance.
            max_steps: The largest number of steps.
            return_solution: Return ``(z, solution)``.

        Returns:
            The fixed point, or the pair.
        """
        if z0 is None:
            z0 = self.start(*inputs)
        solution = self._solve(self.f, z0, inputs, stopping=stopping, rtol=rtol, atol=atol, max_steps=max_steps)
        return (solution.value, solution) if return_solution else solution.value

    def iterates(self, *inputs: Any, steps: Sequence[int], z0: S | None = None) -> list[S]:
        """``f(v, *inputs)`` with the gradient of this call, for each value v that the layer has after so many steps.

        So each is one application of ``f`` beyond what the layer would return: see :func:`implicit.iterates`.

        Args:
            *inputs: Handed to ``f`` after the state.
            steps: Numbers of steps, increasing.
            z0: As in a call of the layer.

        Returns:
            One state for each of ``steps``.
        """
        return iterates(
            self.f,
            self.start(*inputs) if z0 is None else z0,
            *inputs,
            steps=steps,
            solver=self.solver,
            stopping=self.stopping,
            batch_dims=self.batch_dims,
        )

    def start(self, *inputs: Any) -> Any:
        """Where the solve for these inputs starts from without ``z0``: ``init(*inputs)``, or zeros."""
        if self.init is not None:
            return self.init(*inputs)
        if not inputs or not isinstance(inputs[0], Tensor):
            came = f"a {type(inputs[0]).__name__}" if inputs else "no input"
            raise ValueError(
                f"The start is zeros like the first input, which must be a tensor; got {came}. Give z0=..., or "
                "FixedPointLayer(init=...), a callable of the inputs."
            )
        return torch.zeros_like(inputs[0])
