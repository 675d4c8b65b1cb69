"""Random numbers that depend on a seed, and disturb no others."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Let the CPU's generator, and no other, start from a seed within the context, and go on as before outside.

    Args:
        seed: whole number, or None to leave the generator alone.

    Example:
        >>> with seeded(1):
        ...     first = torch.rand(1)
        >>> with seeded(1):
        ...     torch.equal(first, torch.rand(1))
        True
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield
