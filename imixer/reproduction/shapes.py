"""What the files of a sweep must hold, so that tables and figures can be made of them."""

import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np

from imixer.reproduction.measurements import LAST_STEP


def number(value: Any) -> bool:
    """Whether it is a number, and not a string of one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number_or_null(value: Any) -> bool:
    """Whether it is a number, or was not measured."""
    return value is None or number(value)


def text(value: Any) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def text_or_null(value: Any) -> bool:
    """Whether it is a string or nothing."""
    return value is None or text(value)


def array(*sizes: int | None) -> Callable[[Any], bool]:
    """A test for nested lists of numbers with these sizes, where None is any size."""

    def array_of_sizes(value: Any) -> bool:
        try:
            found = np.asarray(value)
        except ValueError:  # lists of different lengths
            return False
        fits = len(found.shape) == len(sizes) and all(
            size in (None, n) and n > 0 for size, n in zip(sizes, found.shape, strict=True)
        )
        return fits and found.dtype.kind in "iuf"

    return array_of_sizes


# A dict is an object with these keys, of which those with a question mark may be missing, and "*" stands for all; a
# list of one shape is a list of such values, with one at least; a function tests a value.
SHAPES: dict[str, Any] = {
    "sweep.json": {
        "scale": text,
        "names": [text],
        "data_dir": text_or_null,
        "data_sets": [text],
        "seeds?": {"*": number},
        "images?": {"*": {}},
    },
    "training.json": {"metrics": [{"test_top1": number, "seconds": number}]},
    "failure.json": {"sweep": text, "reason": text},
    "started.json": {"sweep": text, "pid": number},
    "environments.json": [{"*": text}],
    "iteration.json": {"layers": {"*": {"step": array(LAST_STEP), "cosine": array(LAST_STEP)}}},
    "feature-maps.json": {
        "steps": array(None),
        "images": array(2, None, None, None),
        "maps": array(2, 4, None, None, None),
    },
    "inference-steps.json": {"top1": {"*": number}},
    "certificate.json": {"bound": number, "rate": number_or_null},
    "step.json": {
        "points": [
            {"point": text, "seconds": number, "calls": number, "products": number}
            | {"bytes_saved": number, "cosine": number}
        ]
    },
}


def check_shape(value: Any, shape: Any, name: str = "it") -> None:
    """Compare a value that was read from a file with its shape.

    Args:
        value: Plain values.
        shape: As in :data:`SHAPES`.
        name: What to call it.

    Raises:
        ValueError: It differs; the message says where.
    """
    if isinstance(shape, dict):
        if not isinstance(value, dict) or (not value and "*" in shape):
            raise ValueError(f"{name} is {reprlib.repr(value)}")
        for key, of_key in shape.items():
            if key == "*":
                for found, item in value.items():
                    check_shape(item, of_key, repr(found))
            elif key.rstrip("?") in value:
                check_shape(value[key.rstrip("?")], of_key, repr(key.rstrip("?")))
            elif not key.endswith("?"):
                raise ValueError(f"{name} has no {key!r}")
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name} is {reprlib.repr(value)}")
        for item in value:
            check_shape(item, shape[0], f"an entry of {name}")
    elif not shape(value):
        raise ValueError(f"{name} is {reprlib.repr(value)}")
