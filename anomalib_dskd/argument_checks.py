"""Checks of argument values that all models share."""

import math
from typing import get_args

from anomalib_dskd.errors import ArgumentError

__all__ = ["check_choice", "check_not_negative"]


def check_choice(choices: object, **values: str) -> None:
    """Check that every value is one of the strings in a ``Literal``.

    Args:
        choices: ``Literal`` type of the supported values.
        **values: values by argument name.

    Raises:
        ArgumentError: a value is not supported.
    """
    supported = get_args(choices)
    for name, value in values.items():
        if value not in supported:
            msg = f"{name} {value!r} is not supported. Supported values: {', '.join(map(repr, supported))}."
            raise ArgumentError(msg)


def check_not_negative(**values: float) -> None:
    """Check that every number is finite and not negative.

    Args:
        **values: numbers by argument name.

    Raises:
        ArgumentError: a number is negative, infinite or NaN.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            msg = f"{name} {value!r} must be a finite number, 0 or larger."
            raise ArgumentError(msg)
