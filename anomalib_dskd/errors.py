"""Errors that say what was given, what is legal and what to do."""

__all__ = ["ArgumentError", "DataError", "DskdError", "NotTrainedError", "TeacherWeightsError"]


class DskdError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(DskdError):
    """An argument has a value that the model or the data module cannot work with.

    No ``ValueError``: anomalib's command line would bury it among the alternatives that its parser tried.
    """


class TeacherWeightsError(DskdError):
    """The teacher's pretrained weights are missing, unreadable or of another architecture."""


class DataError(DskdError):
    """A file or folder of a data set is missing, unreadable or not laid out as expected."""


class NotTrainedError(DskdError, RuntimeError):
    """A result was asked of a model whose students have not been trained."""
