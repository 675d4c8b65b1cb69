"""What a look at a data set can find."""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Finding", "Severity"]

Severity = Literal["error", "warning", "note"]


@dataclass
class Finding:
    """Something to know about a data set.

    Attributes:
        severity: ``error``, results would be wrong or training would stop; ``warning``, results may mislead;
            ``note``, good to know.
        kind: short name, for machines.
        message: what it is, and what to do.
        files: the files that it is true of.
    """

    severity: Severity
    kind: str
    message: str
    files: list[str] = field(default_factory=list)
