"""Data modules, and reading and checking of image files."""

from anomalib_dskd.data.anomalib_files import install_workarounds
from anomalib_dskd.data.magnetic_tile import MagneticTile
from anomalib_dskd.data.texture_defects import TextureDefects

__all__ = ["MagneticTile", "TextureDefects"]

install_workarounds()
