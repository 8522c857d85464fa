"""Random numbers that depend on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator_of(*key: str | int) -> torch.Generator:
    """Return a generator for `key`, such as `("order", seed, epoch)`: the same one for the same key, always."""
    return torch.Generator().manual_seed(_words(key)[0])


def seed_global_generators(*key: str | int) -> None:
    """Seed Python's, NumPy's and PyTorch's CPU generators, which timm's and torchvision's transforms draw from."""
    # NumPy and PyTorch run the same Mersenne twister: from one seed, a flip would go with the choice of an operation.
    python_seed, numpy_seed, torch_seed = _words(key)
    random.seed(python_seed)
    np.random.seed(numpy_seed % 2**32)
    # torch.manual_seed would seed the GPUs' generators too, which are the model's.
    torch.default_generator.manual_seed(torch_seed)


@contextmanager
def restored_global_generators() -> Iterator[None]:
    """Leave these generators, at the end, as they were found."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def _words(key: tuple[str | int, ...]) -> tuple[int, int, int]:
    """Hash `key` to three independent numbers below 2^63."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=24).digest()
    first, second, third = (int.from_bytes(digest[start : start + 8], "little") >> 1 for start in (0, 8, 16))
    return first, second, third
