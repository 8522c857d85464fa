"""Autocast modes, saved and set; devices without autocast (meta) are left alone."""

import contextlib
import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class AutocastMode:
    """Whether autocast is on for a device type, and to which dtype."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def current(cls, device_type: str) -> "AutocastMode":
        """The mode in force."""
        if device_type == "meta":  # torch.amp.is_autocast_available would tell, but does not compile in PyTorch 2.11
            return cls(device_type, False, torch.float32)
        return cls(device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))

    def in_force(self) -> contextlib.AbstractContextManager[object]:
        """A context in which this mode is in force."""
        if self == AutocastMode.current(self.device_type):
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """A context in which autocast is off for a device type."""
    return dataclasses.replace(AutocastMode.current(device_type), enabled=False).in_force()
