"""The errors of this package. Each message says what was given, what is supported and what to do."""

from pathlib import Path

from typing_extensions import Self

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "DataError",
    "DivergedError",
    "DskdError",
    "NotTrainedError",
    "TeacherWeightsError",
    "UnreadableImageError",
    "UnsafeImageError",
]


class DskdError(Exception):
    """Base class of the errors that this package raises."""


class ArgumentError(DskdError, ValueError):
    """An argument has a value that the model or the data module does not support."""


class TeacherWeightsError(DskdError):
    """The teacher's pretrained weights are missing, unreadable or of another architecture."""


class DataError(DskdError):
    """A file or folder of a data set is missing, unreadable or does not have the expected layout."""


class UnreadableImageError(DataError, OSError):
    """An image file is missing, truncated, or not an image."""

    @classmethod
    def of(cls, path: str | Path, reason: object) -> Self:
        """Return the error for a file."""
        return cls(f"image {str(path)!r} cannot be read: {reason}. Replace the file, or remove it from the data set.")


class UnsafeImageError(DataError):
    """An image file must not be decoded: it would take too much memory, or run a program."""


class NotTrainedError(DskdError, RuntimeError):
    """An operation needs a trained model, and the students have not been trained."""


class DivergedError(DskdError, ArithmeticError):
    """The training loss or a weight is not finite."""


class CheckpointError(DskdError, OSError):
    """A checkpoint cannot be written or read."""
