"""A finding of the data set check, and merging equal findings."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

__all__ = ["Finding", "Severity", "merge_findings"]

Severity = Literal["error", "warning", "note"]


@dataclass
class Finding:
    """A problem of a data set, or a property to know about.

    Attributes:
        severity: ``error``, results would be wrong or training would fail; ``warning``, results may mislead;
            ``note``, for information.
        kind: machine-readable name.
        message: description, and what to do.
        files: the affected files.
    """

    severity: Severity
    kind: str
    message: str
    files: list[str] = field(default_factory=list)


def merge_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Merge findings that differ only in their files; return them with the highest severity first."""
    merged: dict[tuple[Severity, str, str], dict[str, None]] = {}  # the inner one is an ordered set of files
    for finding in findings:
        files = merged.setdefault((finding.severity, finding.kind, finding.message), {})
        files.update(dict.fromkeys(finding.files))
    severities = get_args(Severity)
    return sorted(
        (Finding(*key, list(files)) for key, files in merged.items()), key=lambda f: severities.index(f.severity)
    )
