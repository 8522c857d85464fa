"""Options by the names that other libraries give them: an error says what they are called here."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_NOTHING = "nothing"
_UNNAMED = ""  # what is given without a name
_STEPS = (
    ("max_steps", "max_steps=..."),
    ("steps", "steps=..."),
    ("terms", "terms=..."),
    ("linear_solver", "linear_solver=GMRES(max_steps=...)"),
)
_RTOL = (("rtol", "rtol=..."), ("linear_solver", "linear_solver=GMRES(rtol=...)"))
_TOLERANCE = (("rtol", "rtol=... for a relative tolerance, atol=... for an absolute one"), _RTOL[1])

# The other name -> the options that it may mean here, the likeliest first, each with how to write it.
_OURS: dict[str, tuple[tuple[str, str], ...]] = {
    # torchdeq
    "f_solver": (("solver", 'solver="anderson"'),),
    "f_max_iter": _STEPS,
    "f_tol": _RTOL,
    "f_eps": _RTOL,
    "f_stop_mode": _TOLERANCE,
    "b_solver": (("backward", 'backward=Implicit(linear_solver="gmres")'),),
    "b_max_iter": (("backward", "backward=Implicit(linear_solver=GMRES(max_steps=...))"),),
    "b_tol": (("backward", "backward=Implicit(linear_solver=GMRES(rtol=...))"),),
    "b_eps": (("backward", "backward=Implicit(linear_solver=GMRES(rtol=...))"),),
    "b_stop_mode": (("backward", "backward=Implicit(linear_solver=GMRES(rtol=..., atol=...))"),),
    "ift": (("backward", 'backward="implicit"'),),
    "hook_ift": (("backward", 'backward="implicit"'),),
    "grad": (("backward", "backward=Phantom(steps=...)"),),
    "tau": (("damping", "damping=..."), ("backward", "backward=Phantom(damping=...)")),
    "stop_mode": _TOLERANCE,
    "eps": _RTOL,
    "lam": (("least_squares", "nothing: the least-squares problem needs no ridge"),),
    # jaxopt, optimistix, scipy
    "max_iter": _STEPS,
    "maxiter": _STEPS,
    "max_iters": _STEPS,
    "num_iters": _STEPS,
    "max_iterations": _STEPS,
    "tol": _TOLERANCE,
    "xtol": _RTOL,
    "ftol": (("atol", "atol=..."),),
    "m": (("memory", "memory=..."), ("solver", "solver=Anderson(memory=...)")),
    "history_size": (("memory", "memory=..."), ("solver", "solver=Anderson(memory=...)")),
    "history": (("memory", "memory=..."),),
    "beta": (("damping", "damping=..."), ("solver", "solver=Anderson(damping=...)")),
    "mixing_frequency": (("memory", "nothing: every step is mixed; Picard() mixes none"),),
    "implicit_diff": (("backward", 'backward="implicit" or backward="unrolled"'),),
    "implicit_diff_solve": (("backward", 'backward=Implicit(linear_solver="cg")'),),
    "adjoint": (("backward", "backward=Implicit(linear_solver=...)"),),
    "linear_solve": (("backward", 'backward=Implicit(linear_solver="cg")'), ("linear_solver", 'linear_solver="cg"')),
    "solve": (("linear_solver", 'linear_solver="cg"'),),
    "throw": (("on_failure", 'on_failure="raise" or on_failure="ignore"'),),
    "y0": (("z0", "z0"),),
    "init_params": (("z0", "z0"),),
    "optimality_fun": (("optimality", "optimality=..."), ("F", "F")),
    "fixed_point_fun": (("fixed_point", "fixed_point=..."), ("f", "f")),
    "has_aux": (("optimality", "nothing: return only what the condition determines"), ("f", "nothing")),
    "argnums": (("optimality", "nothing: derivatives to all tensor arguments are right"),),
    # Ours, where they are called otherwise.
    "linear_solver": (("backward", "backward=Implicit(linear_solver=...)"),),
    "max_steps": _STEPS,
    "rtol": _RTOL,
    "atol": (("atol", "atol=..."), ("linear_solver", "linear_solver=GMRES(atol=...)")),
    "M": (("preconditioner", "preconditioner=..."),),
    _UNNAMED: (("optimality", "optimality=F for F(z, *args) = 0, or fixed_point=T for T(z, *args) = z,"),),
}


def hint(option: str, known: list[str], of_solves: tuple[str, ...] = ()) -> str:
    """What an unknown option is called here, as a sentence that begins with a space; empty if nobody knows.

    Args:
        option: The unknown option.
        known: Those that exist.
        of_solves: Those that belong to the call of what is constructed.
    """
    for name, written in _OURS.get(option, ()):
        if name in known and written.startswith(_NOTHING):
            return f" Leave it out{written.removeprefix(_NOTHING)}."
        if name in known:
            return f" It is {written} here."
        if name in of_solves:
            return f" It is {written}, in the call of solve, fixed_point, root or FixedPointLayer."
    near = difflib.get_close_matches(option, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def names_options(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: an unknown option is a TypeError that says what it is called here and lists those that exist."""
    parameters = inspect.signature(function).parameters
    known = [
        name
        for name, parameter in parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    is_named = all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters.values())
    takes_inputs = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values())
    elsewhere = " What the map takes is given without a name." if takes_inputs else ""
    allowed = frozenset(known)
    title = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> R:
        if not allowed.issuperset(options):
            option = next(name for name in options if name not in allowed)
            advice = hint(option, known) or elsewhere
            raise TypeError(f"{title} has no option {option!r}.{advice} Its options: {', '.join(known)}.")
        if args and is_named:
            ours = hint(_UNNAMED, known)
            raise TypeError(
                f"{title} takes keyword arguments only, got {args[0]!r}.{ours} Its options: {', '.join(known)}."
            )
        return function(*args, **options)

    return checked
