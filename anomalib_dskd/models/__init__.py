"""One room a model, and ``distillation``: what they share."""

from anomalib_dskd.models.afkd import Afkd
from anomalib_dskd.models.dskd import Dskd

__all__ = ["Afkd", "Dskd"]
