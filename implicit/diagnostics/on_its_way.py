"""Numbers that are copied to the host while the device goes on."""

import torch
from torch import Tensor


class OnItsWay:
    """Numbers on their way from the device to the host, for which nothing waits until they are asked for.

    Args:
        numbers: (n,) on any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def arrived(self) -> list[float]:
        """Wait for the numbers and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._numbers.tolist()
        return numbers
