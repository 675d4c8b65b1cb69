"""The models, one package each; ``distillation`` holds what they share."""

from anomalib_dskd.models.afkd import Afkd
from anomalib_dskd.models.dskd import Dskd
from anomalib_dskd.models.dtgd import Dtgd
from anomalib_dskd.models.tad import Tad

__all__ = ["Afkd", "Dskd", "Dtgd", "Tad"]
