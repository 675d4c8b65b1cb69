"""Checks of argument values that all models share."""

import math
from numbers import Real
from typing import get_args

from anomalib_dskd.errors import ArgumentError

__all__ = ["check_choice", "check_not_negative", "is_number"]


def is_number(value: object) -> bool:
    """Whether a value is a finite real number; truth values and strings are not, which Python code may give.

    >>> is_number(2), is_number(0.5), is_number(math.nan), is_number(True), is_number("2"), is_number(None)
    (True, True, False, False, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


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
    """Check that every value is a finite number that is not negative.

    Args:
        **values: numbers by argument name.

    Raises:
        ArgumentError: a value is negative, infinite, NaN or no number.
    """
    for name, value in values.items():
        if not (is_number(value) and value >= 0):
            msg = f"{name} {value!r} must be a finite number, 0 or larger."
            raise ArgumentError(msg)
