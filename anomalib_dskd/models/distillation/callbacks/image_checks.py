"""Checks of image files before any of them is decoded."""

from anomalib.data import AnomalibDataModule
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_dskd.data.data_module_checks import check_names
from anomalib_dskd.data.image_files import check_data_files, check_headers, dataset_paths

__all__ = ["CheckImageFiles"]

SPLITS = {
    TrainerFn.FITTING: ("train", "val"),
    TrainerFn.VALIDATING: ("val",),
    TrainerFn.TESTING: ("test",),
    TrainerFn.PREDICTING: ("test",),
}
"""Splits of a data module that each stage reads."""


class CheckImageFiles(Callback):
    """Refuses image files that would be misread or are not safe to decode, by their headers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Check the data module's names and the headers of the images that this stage reads.

        Raises:
            ArgumentError: a name that leads out of the folder of results.
            DataError: an image that is not supported, with its file.
        """
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, AnomalibDataModule):
            check_names(data)
            check_data_files(data, SPLITS[TrainerFn(stage)])

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Check the headers of the images to predict, which need not come from a data module.

        Raises:
            DataError: an image that is not supported, with its file.
        """
        check_headers(dataset_paths(trainer.predict_dataloaders))
