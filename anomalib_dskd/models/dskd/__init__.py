"""DSKD: dual-student knowledge distillation."""

from anomalib_dskd.models.dskd.lightning_model import Dskd

__all__ = ["Dskd"]
