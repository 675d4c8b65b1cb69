"""Caching of what is the same in each epoch: decoded training images and the teacher's features of them."""

from typing import TYPE_CHECKING

from anomalib.data import AnomalibDataModule
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_dskd.data.image_cache import cache_training_images, is_deterministic
from anomalib_dskd.models.distillation.training_loader import number_of_images, training_loader
from anomalib_dskd.training.feature_cache import FeatureCache

if TYPE_CHECKING:
    from anomalib_dskd.models.distillation.lightning_model import DistillationModule

__all__ = ["CacheTrainingData"]


class CacheTrainingData(Callback):
    """Decodes each training image once, and runs the teacher once for each, where it sees the same in each epoch.

    It does not with random augmentations, nor with tiles.

    Args:
        images: GiB of memory for decoded images; 0 caches none.
        features: GiB of memory for the teacher's features, beyond which a temporary file is used; 0 caches none.
    """

    def __init__(self, *, images: float, features: float) -> None:
        self.images = images
        self.features = features

    def setup(self, trainer: Trainer, pl_module: "DistillationModule", stage: str) -> None:  # type: ignore[override] # noqa: ARG002
        """Wrap the data module's training set in a cache of decoded images."""
        data = getattr(trainer, "datamodule", None)
        if stage == TrainerFn.FITTING and isinstance(data, AnomalibDataModule):
            cache_training_images(data, memory=self.images)

    def on_train_start(self, trainer: Trainer, pl_module: "DistillationModule") -> None:  # type: ignore[override]
        """Create the feature cache."""
        loader = training_loader(trainer)
        model = pl_module.model
        is_same = model.tiler is None and is_deterministic(getattr(loader.dataset, "augmentations", None))
        if self.features > 0 and is_same:
            model.teacher_cache = FeatureCache(model.teacher, images=number_of_images(loader), memory=self.features)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: "DistillationModule") -> None:  # type: ignore[override] # noqa: ARG002
        """Let the feature cache switch itself off if it does not help."""
        if pl_module.model.teacher_cache is not None:
            pl_module.model.teacher_cache.end_epoch()

    def on_train_end(self, trainer: Trainer, pl_module: "DistillationModule") -> None:  # type: ignore[override] # noqa: ARG002
        """Free the memory of the feature cache."""
        pl_module.model.teacher_cache = None

    def on_exception(self, trainer: Trainer, pl_module: "DistillationModule", exception: BaseException) -> None:  # type: ignore[override] # noqa: ARG002
        """Free the memory of the feature cache after an interruption too."""
        pl_module.model.teacher_cache = None
