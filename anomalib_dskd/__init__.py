"""anomalib-dskd: dual-student knowledge distillation for anomalib."""

from anomalib_dskd.data import MagneticTile, TextureDefects
from anomalib_dskd.models import Dskd

__all__ = ["Dskd", "MagneticTile", "TextureDefects"]
