"""Errors that say what was given, what is legal and what to do."""

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "DivergedError",
    "DskdError",
    "NotTrainedError",
    "TeacherWeightsError",
    "UnsafeImageError",
]


class DskdError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(DskdError, ValueError):
    """An argument has a value that the model or the data module cannot work with."""


class TeacherWeightsError(DskdError):
    """The teacher's pretrained weights are missing, unreadable or of another architecture."""


class DataError(DskdError):
    """A file or folder of a data set is missing, unreadable or not laid out as expected."""


class UnsafeImageError(DataError):
    """An image file must not be decoded: it would take too much memory, or run a program."""


class NotTrainedError(DskdError, RuntimeError):
    """A result was asked of a model whose students have not been trained."""


class DivergedError(DskdError, ArithmeticError):
    """The training loss or a weight is no longer a finite number."""


class CheckpointError(DskdError, OSError):
    """A checkpoint cannot be written or read."""
