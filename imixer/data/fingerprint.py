"""Digests by which a resumed run notices that its images are others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def digest(parts: Iterable[object]) -> str:
    """Return 32 hexadecimal digits for the texts of `parts`; bytes and arrays count by their content."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, (bytes, memoryview)) else str(part).encode("utf-8", "surrogateescape")
        state.update(b"%d:" % len(content))
        state.update(content)
    return state.hexdigest()


def spread(count: int, limit: int) -> range:
    """Return at most `limit` of the numbers below `count`, evenly spaced."""
    return range(0, count, max(1, -(-count // limit)))
