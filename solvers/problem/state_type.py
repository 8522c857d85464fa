"""The static type of a state."""

from typing import Any

from typing_extensions import TypeVar

# A tensor or a pytree of tensors. Whoever writes Solution without a parameter leaves it open.
S = TypeVar("S", default=Any)
