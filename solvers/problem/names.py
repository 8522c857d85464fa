"""Objects by name, for command lines and configuration files."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from solvers.problem.foreign_names import hint

T = TypeVar("T")


def resolve(
    choice: object, options: Mapping[str, Any], base: type[Any], known: Mapping[str, Callable[..., T]], what: str
) -> T:
    """The object of that name with these options; an object passes through.

    Args:
        choice: A name among ``known``, or an object of ``base``.
        options: The hyperparameters of a named object.
        base: The class of all of them, abstract as it may be.
        known: Class, or what makes the object from its options, by name.
        what: What they are called in messages, in one noun: its last word is enough for an object.

    Raises:
        ValueError: There is no such name; the message lists those that exist.
        TypeError: The named one has no such option, options came with an object, or it is neither.
    """
    if isinstance(choice, base):
        if options:
            noun = what.split()[-1]
            raise TypeError(f"Options go with a name, but {choice!r} is a {noun} already: got {sorted(options)}.")
        return cast(T, choice)
    if not isinstance(choice, str):
        qualified = f"{base.__module__.partition('.')[0]}.{base.__name__}"
        article = "an" if qualified[0] in "aeiou" else "a"
        got = repr(choice)
        if isinstance(choice, type) and issubclass(choice, base):
            got = f"the class {choice.__name__}. Make an object of it: {choice.__name__}()"
        raise TypeError(f"A {what} must be {article} {qualified} object or a name, got {got}.")
    if choice not in known:
        advice = hint(choice.lower(), [*known])
        raise ValueError(f"There is no {what} {choice!r}.{advice} The known ones: {', '.join(known)}.")
    return known[choice](**options)
