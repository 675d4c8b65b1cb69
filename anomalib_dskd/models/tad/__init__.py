"""TAD++: heterogeneous teacher-assistant dual-path learning."""

from anomalib_dskd.models.tad.lightning_model import Tad

__all__ = ["Tad"]
