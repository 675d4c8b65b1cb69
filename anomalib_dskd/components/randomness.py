"""Seeded random numbers that leave PyTorch's generator unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed PyTorch's CPU generator within the context, and restore its state afterwards.

    Args:
        seed: integer, or None to change nothing.

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
