"""anomalib-dskd: knowledge distillation for anomalib: DSKD and its siblings."""

from anomalib_dskd.data import MagneticTile, TextureDefects
from anomalib_dskd.models import Afkd, Dskd, Dtgd, Tad

__all__ = ["Afkd", "Dskd", "Dtgd", "MagneticTile", "Tad", "TextureDefects"]
