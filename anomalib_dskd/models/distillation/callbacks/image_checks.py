"""Checks of a data module's files before any of them is decoded, and of the files that results are saved to."""

from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.visualization import ImageVisualizer
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_dskd.data.anomalib_files import name_files_in_workers
from anomalib_dskd.data.data_module_checks import check_names, check_validation_images
from anomalib_dskd.data.image_files import check_data_files, check_headers, dataset_paths, loader_datasets
from anomalib_dskd.data.links import check_data_links
from anomalib_dskd.data.mask_pairs import check_mask_pairs
from anomalib_dskd.visualization import check_file_names

__all__ = ["CheckImageFiles"]

SPLITS = {
    TrainerFn.FITTING: ("train", "val"),
    TrainerFn.VALIDATING: ("val",),
    TrainerFn.TESTING: ("test",),
    TrainerFn.PREDICTING: ("test",),
}
"""Splits of a data module that each stage reads."""


class CheckImageFiles(Callback):
    """Refuses files that would be misread, left out, paired wrongly or overwritten, or that are not safe to decode."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Check the data module's names, links, pairs and validation images, and the headers that this stage reads.

        Raises:
            ArgumentError: a name that leads out of the folder of results, or no validation images.
            DataError: images that are not supported, would be left out, or have another image's mask; with their files.
        """
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, AnomalibDataModule):
            check_names(data)
            check_data_links(data)
            check_mask_pairs(data)
            splits = SPLITS[TrainerFn(stage)]
            if "val" in splits and trainer.limit_val_batches:
                check_validation_images(data)
            check_data_files(data, splits)
            for split in splits:
                name_files_in_workers(getattr(data, f"{split}_data", None))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that each image is saved to a file of its own.

        Raises:
            ArgumentError: two images that would be saved to one file.
        """
        _check_file_names(trainer, pl_module, trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the headers of the images to predict, which need not come from a data module.

        Raises:
            ArgumentError: two images that would be saved to one file.
            DataError: an image that is not supported, with its file.
        """
        loaders = trainer.predict_dataloaders
        check_headers(dataset_paths(loaders))
        _check_file_names(trainer, pl_module, loaders)
        for dataset in loader_datasets(loaders):
            name_files_in_workers(dataset)


def _check_file_names(trainer: Trainer, module: LightningModule, loaders: Any) -> None:  # noqa: ANN401 - of any type
    visualizer = getattr(module, "visualizer", None)
    if isinstance(visualizer, ImageVisualizer):
        check_file_names(visualizer, dataset_paths(loaders), getattr(trainer, "datamodule", None))
