"""Report of where the images with anomaly maps are."""

import logging
from pathlib import Path

from anomalib.visualization import ImageVisualizer
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

__all__ = ["ReportImageFolder"]

logger = logging.getLogger(__name__)


class ReportImageFolder(Callback):
    """Logs the folder in which anomalib's visualizer has saved images, after a test or a prediction."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Log the folder, below the table of metrics."""
        visualizer = getattr(pl_module, "visualizer", None)
        if stage not in {TrainerFn.TESTING, TrainerFn.PREDICTING} or not isinstance(visualizer, ImageVisualizer):
            return
        if trainer.is_global_zero and visualizer.output_dir is not None and Path(visualizer.output_dir).is_dir():
            logger.info("Images with anomaly maps: %s", visualizer.output_dir)
