"""Derivatives of answers that any code has found, by the condition that they satisfy."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from implicit.autograd.constant_weights import ConstantWeights
from implicit.autograd.explicit_map import FirstCall, make_explicit
from implicit.autograd.fixed_point_function import fixed_point_of
from implicit.autograd.problem import Leaves, OneAtATime, Problem, vjp
from implicit.autograd.torch_internals import cached_weights, current_loans, is_followed, transform_active
from implicit.backward.implicit import for_leaves, for_matrices
from solvers import Solution, Status, report_failure
from solvers.linear import AutoLinear, LinearSolver, get_linear_solver
from solvers.problem import (
    Layout,
    OnFailure,
    as_float,
    check_on_failure,
    direction_of,
    names_options,
    relative,
    rms_norm,
    slope_inverse,
)

P = ParamSpec("P")
R = TypeVar("R")


@names_options
def differentiable(
    *,
    optimality: Callable[..., Any] | None = None,
    fixed_point: Callable[..., Any] | None = None,
    batch_dims: int = 0,
    linear_solver: LinearSolver | str = "auto",
    rtol: float = 1e-4,
    atol: float = 0.0,
    on_failure: OnFailure = "warn",
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that gives the answer of any code its derivatives, by the condition that the answer satisfies.

    The code may be anything: ``scipy.optimize``, scikit-learn, a loop, a C++ library. It is called with tensors that
    record no gradient, and what happens in it is not differentiated. Its answer z satisfies one of

        optimality(z, *args) = 0,        fixed_point(z, *args) = z,

    and with F = optimality, or F(z) = fixed_point(z) - z, the implicit function theorem gives, for the incoming
    gradient w, ``F_z' u = -w`` and the gradient ``F_t' u`` to every tensor t among the arguments and to what the
    condition brings along. Derivatives of every order, reverse and forward mode, and the transforms of ``torch.func``
    are supported; under ``torch.func.vmap`` the code is called for one entry after the other. While a transform is
    tracing, tensors that the condition depends on must be arguments.

    The condition is given the arguments of the decorated function, defaults included: the positional ones in their
    order, as many as it has parameters after z, and keyword-only ones of the names that it has. Others, such as a limit
    on iterations, are for the function alone. Arguments that are not tensors are passed on as they are.

    Every answer is checked, because a wrong answer has no right derivative. With c the reciprocal of the slope of F
    along F, so that ``c F`` estimates the error, an answer passes if ``norm(c F(z)) <= atol + rtol * norm(z)``, in the
    root mean square. This costs a call of the condition and a product with its Jacobian. Of problems of at most 32
    unknowns, an answer must then also be within this bound of the root that Newton's method sees from there, which
    finds errors in equations that are much smaller than others. This costs one product per unknown.

    Args:
        optimality: The condition F(z, *args) = 0: a function of something like the answer to something like the answer.
            For a minimizer it is the gradient of the objective, see :func:`stationary`.
        fixed_point: The condition T(z, *args) = z, instead; see :func:`projected_gradient`.
        batch_dims: How many leading dimensions of the answer index independent problems; by default the answer is one
            coupled problem.
        linear_solver: The solver of the linear systems, or its name: "auto" is dense for problems of at most 32
            unknowns and iterative otherwise; "cg" for minimizers of many unknowns.
        rtol: Relative tolerance of the check. It does not loosen the linear solves, whose tolerances are their solver's
            own: by default ``eps ** 0.75`` of the dtype.
        atol: Absolute tolerance of the check, in the units of the answer. Needed where an answer may be near zero.
        on_failure: "warn", "raise" or "ignore", for an answer that fails the check and for linear solves.

    Returns:
        The decorator. The decorated function returns what the function returns, a tensor or a pytree of tensors.

    Raises:
        ConvergenceError: When called: an answer failed the check and ``on_failure="raise"``.
        TypeError, ValueError: An option is not valid; when called: the answer, or what the condition returns, is not.

    Example:
        >>> import torch
        >>> from implicit import differentiable
        >>> def square_root_condition(z, x):
        ...     return z**2 - x
        >>> @differentiable(optimality=square_root_condition)
        ... def square_root(x):
        ...     return torch.tensor(x.item() ** 0.5)  # any code
        >>> x = torch.tensor(4.0, requires_grad=True)
        >>> torch.autograd.grad(square_root(x), x)
        (tensor(0.2500),)
    """
    if (optimality is None) == (fixed_point is None):
        raise TypeError(
            "differentiable() needs one condition that the answer satisfies: optimality=F for F(z, *args) = 0, or "
            f"fixed_point=T for T(z, *args) = z. Got optimality={optimality!r} and fixed_point={fixed_point!r}."
        )
    condition = optimality if optimality is not None else fixed_point
    if not callable(condition):
        raise TypeError(f"The condition must be a function of the answer and the arguments, got {condition!r}.")
    check_on_failure(on_failure)
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        value = as_float(tolerance)
        if value is None or not value >= 0:
            raise ValueError(f"differentiable({name}=...) must be a number >= 0, got {tolerance!r}.")
    solver = get_linear_solver(linear_solver)
    is_root = optimality is not None

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if not callable(function):
            raise TypeError(f"differentiable(...) decorates a function, got {function!r}.")
        answer = _Answer(function, condition, is_root, batch_dims, solver, rtol, atol, on_failure)

        @functools.wraps(function)
        def decorated(*args: P.args, **options: P.kwargs) -> R:
            find: Callable[..., R] = answer.under_transform if transform_active() else answer
            if not torch.compiler.is_compiling():
                return find(args, options)
            from solvers.problem import untraced

            apart: R = untraced.answer(find, args, options)
            return apart

        return decorated

    return decorate


class _Answer:
    """A function whose answers satisfy a condition; arguments as those of :func:`differentiable`."""

    def __init__(
        self,
        function: Callable[..., Any],
        condition: Callable[..., Any],
        is_root: bool,
        batch_dims: int,
        linear_solver: LinearSolver,
        rtol: float,
        atol: float,
        on_failure: OnFailure,
    ) -> None:
        self._function, self._condition = function, condition
        self._is_root, self._batch_dims = is_root, batch_dims
        self._linear_solver = linear_solver
        self._rtol, self._atol, self._on_failure = rtol, atol, on_failure
        self._name = getattr(function, "__qualname__", repr(function))
        self._condition_name = f"{'optimality' if is_root else 'fixed_point'}={_name_of(condition)}"
        self._arguments = _Arguments(function, condition, self._name, self._condition_name)

    def __call__(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        value = self._find(args, options)
        z, spec = tree_flatten(value)
        self._arguments.check(args, options)
        differentiated = torch.is_grad_enabled()
        loans, weights = current_loans(), ConstantWeights(cached_weights())
        first_call = FirstCall(self._map, weights, loans, self._condition)
        with torch.no_grad(), weights.in_force():
            if differentiated:
                first_call(value, args, options)  # finds what the condition brings along
            constant = tree_map_only(Tensor, Tensor.detach, (args, options))
            self._check_answer(value, lambda z: self._map(z, *constant))
        if not differentiated:
            return value
        explicit, tensors = make_explicit(self._map, value, (args, options), weights.values, loans)
        problem = self._problem(
            explicit,
            for_leaves(self._linear_solver, spec),
            self._batch_dims,
            lambda map_, z, tensors, batch_dims: [leaf.detach() for leaf in z],
            transformed=False,
        )
        return tree_unflatten(fixed_point_of(problem, z, tensors, first_call.captured or []), spec)

    def under_transform(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The same while a transform is tracing: only inside the Function, which unwraps them, are tensors plain.

        The answer goes through it as one matrix, because nothing is known of its structure outside.
        """
        self._arguments.check(args, options)
        leaves, spec = tree_flatten((args, options))
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        others = [None if known else leaf for leaf, known in zip(leaves, is_tensor, strict=True)]
        layouts: list[Layout] = []

        def arguments(tensors: Leaves) -> tuple[tuple[Any, ...], dict[str, Any]]:
            supply = iter(tensors)
            both = [next(supply) if known else leaf for leaf, known in zip(others, is_tensor, strict=True)]
            args, options = tree_unflatten(both, spec)
            return args, options

        def map_(z: Leaves, tensors: Leaves) -> list[Tensor]:
            output = self._map(layouts[0].unpack(z[0]), *arguments(tensors))
            layouts[0].check(output, self._condition_name)
            return [layouts[0].pack(output)]

        def find(tensors: Leaves) -> list[Tensor]:
            value = self._find(*arguments(tensors))
            layouts.append(Layout(value, self._batch_dims))
            if len(layouts) > 1 and layouts.pop().shapes != layouts[0].shapes:
                raise ValueError(
                    f"Under torch.func.vmap the answers of {self._name} must have the same shapes for all entries."
                )
            self._check_answer(value, lambda z: self._map(z, *arguments(tensors)))
            return [layouts[0].pack(value)]

        tensors = [leaf for leaf, known in zip(leaves, is_tensor, strict=True) if known]
        placeholder = torch.empty(0)
        linear_solver = for_matrices(self._linear_solver, lambda: layouts[0])
        problem = self._problem(map_, linear_solver, 1, OneAtATime(find), transformed=True)
        found = fixed_point_of(problem, [placeholder], tensors, [])
        if not found:
            raise ValueError(
                f"{self._name} is mapped by torch.func.vmap over a dimension of size 0, so it is never called and the "
                "shape of its answers is not known. Leave out empty batches."
            )
        (flat,) = found
        with torch.enable_grad():
            image = map_([flat.detach()], [tensor.detach() for tensor in tensors])
        if any(map(is_followed, image)):
            raise RuntimeError(
                f"{self._condition_name} uses a tensor that requires grad, or that a torch.func transform is "
                f"following, but that is not among the arguments of {self._name}, so its derivative would be lost. "
                "Pass the tensor as an argument, or detach it if it is a constant."
            )
        return layouts[0].unpack(flat)

    def _problem(
        self,
        map_: Callable[..., list[Tensor]],
        linear_solver: LinearSolver,
        batch_dims: int,
        solve: Callable[..., list[Tensor]],
        *,
        transformed: bool,
    ) -> Problem:
        return Problem(
            map=map_,
            solve=solve,
            batch_dims=batch_dims,
            adjoint_solver=linear_solver,
            rtol=None,
            on_failure=self._on_failure,
            resolution=getattr(map_, "resolution", 0.0),
            transformed=transformed,
            what=f"The linear solve of the derivative of {self._name}",
            root=self._is_root,
        )

    def _find(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The answer, a tensor or a pytree of tensors."""
        args, options = tree_map_only(Tensor, Tensor.detach, (args, options))
        with torch.enable_grad():  # for code that differentiates by itself, such as an optimizer
            value = self._function(*args, **options)
        for leaf in tree_leaves(value):
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"{self._name} must return a tensor or a pytree of tensors, got {type(leaf).__name__} in its "
                    "answer. Convert arrays with torch.as_tensor; return only what the condition determines."
                )
        # A copy: the next answer may be written into the same memory.
        return tree_map(lambda leaf: leaf.detach().clone(), value)

    def _map(self, z: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        positional, named = self._arguments.of_condition(args, options)
        return self._condition(z, *positional, **named)

    def _check_answer(self, value: Any, map_: Callable[[Any], Any]) -> None:
        """Report an answer that does not satisfy the condition ``map_``."""
        layout = Layout(value, self._batch_dims)
        flat = layout.pack(value)
        with torch.enable_grad():
            z = flat.detach().requires_grad_()
            output = map_(layout.unpack(z))
            layout.check(output, self._condition_name)
            residual = layout.pack(output) if self._is_root else layout.pack(output) - z
        error = residual.detach()
        direction = direction_of(error)
        (product,) = vjp([residual], [z], [direction])
        c = slope_inverse(direction, product).abs().squeeze(1)
        size, estimate = rms_norm(flat), rms_norm(error)
        # A condition that does not depend on the answer determines none.
        estimate = torch.where(estimate == 0, 0.0, estimate * c)
        bound = self._atol + self._rtol * size
        met = estimate <= bound
        asked = (met & (estimate > 0)).nonzero().squeeze(1)
        if 1 < flat.shape[1] <= AutoLinear.max_unknowns and len(asked):
            units = torch.eye(flat.shape[1]).to(flat)
            jacobian = torch.stack([vjp([residual], [z], [unit.expand_as(z)])[0] for unit in units], dim=1)  # (B, D, D)
            eps = max(torch.finfo(dtype).eps for dtype in layout.dtypes)
            step = rms_norm(_newton_step(flat[asked], error[asked], jacobian[asked], eps))
            estimate = estimate.index_copy(0, asked, torch.maximum(estimate[asked], step))
            met = estimate <= bound
        if bool(met.all()):
            return
        status = torch.where(met, Status.CONVERGED, Status.NOT_A_SOLUTION).to(torch.int8)
        solution = Solution(
            value=value,
            status=layout.unpack_batch(status),
            residual=layout.unpack_batch(relative(estimate, size)),
            change=layout.unpack_batch(rms_norm(error)),
            num_steps=layout.unpack_batch(torch.ones_like(status, dtype=torch.int64)),
            num_evals=1,
        )
        tolerances = f"rtol={self._rtol!r}" + (f", atol={self._atol!r}" if self._atol else "")
        report_failure(
            solution,
            self._on_failure,
            f"The answer of {self._name}",
            failed=f"does not satisfy {self._condition_name}",
            goal=tolerances,
        )


def _newton_step(z: Tensor, residual: Tensor, jacobian: Tensor, eps: float) -> Tensor:
    """(B, D) Newton's step from z, where residuals of a few rounding errors count as 0; the shortest of several.

    Args:
        z: (B, D).
        residual: (B, D) the condition at z.
        jacobian: (B, D, D) its Jacobian.
        eps: The relative rounding error of the condition.
    """
    # Equations of the same size: else the small ones look dependent on the others.
    unit = jacobian.abs().amax(dim=2, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    matrix, target = jacobian / unit, residual.unsqueeze(2) / unit
    rounding = 16 * eps * (matrix.abs() @ z.abs().unsqueeze(2))
    target = torch.where(target.abs() > rounding, target, 0.0)
    step: Tensor = torch.linalg.pinv(matrix) @ target
    return step.squeeze(2)


class _Arguments:
    """Which arguments of a function its condition takes."""

    def __init__(
        self, function: Callable[..., Any], condition: Callable[..., Any], name: str, condition_name: str
    ) -> None:
        self._signature = _signature(function)
        self._name, self._condition_name = name, condition_name
        self._most: int | None = None
        self._names: set[str] | None = None
        signature = _signature(condition)
        if signature is None:
            return
        kinds = [parameter.kind for parameter in signature.parameters.values()]
        if inspect.Parameter.VAR_POSITIONAL not in kinds:
            positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            self._most = sum(kind in positional for kind in kinds) - 1
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            self._names = set(signature.parameters)

    def of_condition(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and the named arguments of the condition after z."""
        positional, named = self._bound(args, options)
        return positional[: self._most], {k: v for k, v in named.items() if self._names is None or k in self._names}

    def check(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """Raise a TypeError if a tensor that a derivative is taken to does not reach the condition."""
        positional, named = self._bound(args, options)
        taken, taken_named = self.of_condition(args, options)
        lost = [*positional[len(taken) :], *(value for key, value in named.items() if key not in taken_named)]
        for leaf in tree_leaves(lost):
            if isinstance(leaf, Tensor) and is_followed(leaf):
                raise TypeError(
                    f"{self._name} is called with a tensor of shape {tuple(leaf.shape)} that requires grad, and "
                    f"{self._condition_name} does not take that argument, so that its derivative would be lost. Give "
                    "the condition the same parameters as the function, after z; or detach the tensor."
                )

    def _bound(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._signature is None:
            return args, dict(options)
        bound = self._signature.bind(*args, **options)
        bound.apply_defaults()
        return bound.args, bound.kwargs


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # of some functions written in C
        return None


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
