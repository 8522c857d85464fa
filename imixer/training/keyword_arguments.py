"""Keyword arguments that are passed on to timm, as its train.py has them: ``--model-kwargs NAME=VALUE ...``."""

import argparse
import ast
from collections.abc import Iterable
from typing import Any


class ReadKeywordArguments(argparse.Action):
    """Reads ``NAME=VALUE`` texts into a dictionary."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: object = None
    ) -> None:
        try:
            setattr(namespace, self.dest, read_keyword_arguments(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error


def read_keyword_arguments(texts: Iterable[str]) -> dict[str, Any]:
    """Read texts such as ``mlp_ratio=(0.5,4)``. A value that is not a Python literal is taken as text.

    Raises:
        ValueError: A text is not ``NAME=VALUE``, or a name comes twice.
    """
    arguments: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{text!r} is not NAME=VALUE, such as stem_norm=True")
        if name in arguments:
            raise ValueError(f"{name} is given twice")
        try:
            arguments[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            arguments[name] = value
    return arguments


def plain(value: Any, name: str) -> Any:
    """A value that YAML and checkpoints can hold, with tuples instead of lists.

    Raises:
        ValueError: It is none.
    """
    try:
        return _plain(value)
    except RecursionError:
        raise ValueError(f"{name} is nested too deep, or contains itself") from None
    except TypeError as error:
        raise ValueError(
            f"{name} must consist of numbers, texts, True, False, None, lists, and dictionaries with texts as keys, "
            f"which can be saved with the run, not {error}"
        ) from None


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_plain(entry) for entry in value)
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(entry) for key, entry in value.items()}
    raise TypeError(repr(value))
