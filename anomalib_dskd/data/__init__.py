"""Data modules; they know no model."""

from anomalib_dskd.data.magnetic_tile import MagneticTile
from anomalib_dskd.data.texture_defects import TextureDefects

__all__ = ["MagneticTile", "TextureDefects"]
