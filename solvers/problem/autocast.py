"""Autocast modes, saved and set; devices without autocast (meta) are left alone."""

import contextlib
import dataclasses
from collections.abc import Iterable

import torch


@dataclasses.dataclass(frozen=True)
class AutocastMode:
    """Whether autocast is on for a device type, and to which dtype; None where it is off."""

    device_type: str
    dtype: torch.dtype | None

    @classmethod
    def current(cls, device_type: str) -> "AutocastMode":
        """The mode in force."""
        return cls(device_type, _dtype_in_force(device_type))

    @property
    def enabled(self) -> bool:
        """Whether autocast is on."""
        return self.dtype is not None

    def dtypes_of(self, state: Iterable[torch.dtype]) -> set[torch.dtype]:
        """The dtypes in which a map of states of these dtypes computes. Autocast leaves float64 as it is."""
        dtypes = set(state)
        return dtypes if self.dtype is None or dtypes == {torch.float64} else {*dtypes, self.dtype}

    def in_force(self) -> contextlib.AbstractContextManager[object]:
        """A context in which this mode is in force. Cheap where it already is: it stands around every call of a map."""
        if self.dtype is _dtype_in_force(self.device_type):
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast is off for a device type."""
    return AutocastMode(device_type, None).in_force()


def _dtype_in_force(device_type: str) -> torch.dtype | None:
    # For meta torch.amp.is_autocast_available would tell, but that does not compile in PyTorch 2.11.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
