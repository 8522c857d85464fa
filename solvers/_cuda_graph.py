"""Calls that are captured as CUDA graphs: to launch one takes a fraction of the time of launching its kernels."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable

import torch


class CaptureError(RuntimeError):
    """A call cannot be captured, for example because it waits for the device."""


@dataclasses.dataclass
class _Place:
    """Where a thread captures on a device: with one stream and one pool, no capture has to ask for memory again.

    Attributes:
        stream: The stream.
        kept: A graph that is kept, and the pool of memory with it, which ends with the last graph in it.
    """

    stream: torch.cuda.Stream
    kept: torch.cuda.CUDAGraph

    @classmethod
    def on(cls, device: torch.device) -> "_Place":
        stream, kept = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        something = torch.zeros((), device=device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            kept.capture_begin(capture_error_mode="thread_local")
            something.add_(1)
            kept.capture_end()
        return cls(stream, kept)


class _Places(threading.local):
    def __init__(self) -> None:
        self.of: dict[torch.device, _Place] = {}


_PLACES = _Places()


class Replayed:
    """A call that is captured now, without being made, and made whenever this is called.

    It may run no code on the host that matters, and every tensor that it takes from outside must stay where it is.

    Args:
        call: The call, which was made before: what it loads or compiles the first time cannot be captured.
        device: Where it runs, a CUDA device with an index.

    Raises:
        CaptureError: It cannot be captured.
    """

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        place = _PLACES.of.get(device)
        if place is None:
            place = _PLACES.of[device] = _Place.on(device)
        generator = torch.cuda.default_generators[device.index]
        state = generator.clone_state()
        self._graph = torch.cuda.CUDAGraph()
        place.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(place.stream):
            try:
                self._graph.capture_begin(pool=place.kept.pool(), capture_error_mode="thread_local")
                call()
                self._graph.capture_end()
            except BaseException as error:
                self._give_up(device, place.kept.pool())
                # It takes part in the capture that has failed, and would refuse any other number.
                generator.graphsafe_set_state(state)
                if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
                    raise  # it tells nothing of the call
                raise CaptureError(str(error)) from error

    def _give_up(self, device: torch.device, pool: tuple[int, int]) -> None:
        """End a capture that has failed: PyTorch leaves its allocator in it, which then never waits for the device."""
        with contextlib.suppress(RuntimeError):
            self._graph.capture_end()
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device.index, pool)
            torch._C._cuda_releasePool(device.index, pool)

    def __call__(self) -> None:
        self._graph.replay()
