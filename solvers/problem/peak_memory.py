"""The peak memory of the tensors that a part of a program creates."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Measure the memory of all tensors created within the context, on any device, as their largest sum of bytes.

    It counts the tensors that PyTorch's operations return, while they are alive. It does not count temporary memory
    within an operation.

    Attributes:
        held: The number of bytes in use now.
        peak: The largest number of bytes in use so far.

    Example:
        >>> import torch
        >>> from solvers.testing import PeakMemory
        >>> x = torch.zeros(1000)
        >>> with PeakMemory() as memory:
        ...     for _ in range(5):
        ...         x = x + 1
        >>> memory.peak
        8000
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._storages: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), given)
        return output

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in given or self._storages.get(key) is storage:
            return
        self._storages[key] = storage
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, nbytes: int) -> None:
        self.held -= nbytes
