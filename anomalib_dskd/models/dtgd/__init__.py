"""DTGD: dual-teacher guided denoising distillation."""

from anomalib_dskd.models.dtgd.lightning_model import Dtgd

__all__ = ["Dtgd"]
