"""Data modules; they know no model."""

from anomalib_dskd.data.magnetic_tile import MagneticTile

__all__ = ["MagneticTile"]
