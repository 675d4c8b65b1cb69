"""One room a model."""

from anomalib_dskd.models.dskd import Dskd

__all__ = ["Dskd"]
