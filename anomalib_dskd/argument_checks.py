"""Checks of arguments that know no model."""

import math
from typing import get_args

from anomalib_dskd.errors import ArgumentError

__all__ = ["check_choice", "check_not_negative"]


def check_choice(legal: object, **values: str) -> None:
    """Raise unless all values are among those of a ``Literal``."""
    for name, value in values.items():
        if value not in get_args(legal):
            msg = f"{name} {value!r} must be {' or '.join(map(repr, get_args(legal)))}."
            raise ArgumentError(msg)


def check_not_negative(**values: float) -> None:
    """Raise unless all numbers are finite, and none is below 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            msg = f"{name} {value!r} must be a finite number, 0 or larger."
            raise ArgumentError(msg)
