"""AFKD: asymptotic fusion knowledge distillation."""

from anomalib_dskd.models.afkd.lightning_model import Afkd

__all__ = ["Afkd"]
