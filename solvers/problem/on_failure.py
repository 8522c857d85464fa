"""What a solve is asked to do when a sample fails."""

from typing import Literal

OnFailure = Literal["warn", "raise", "ignore"]


def check_on_failure(on_failure: str) -> None:
    """Raise a ValueError unless it is one of the three."""
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure must be "warn", "raise" or "ignore", got {on_failure!r}.')
