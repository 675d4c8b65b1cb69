"""Images with anomaly map, score and verdict: each in a file of its own, those of each run in a folder of its own."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import add_text_to_image
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning import LightningModule, Trainer
from PIL import Image, ImageOps

from anomalib_dskd.data.image_files import dataset_paths
from anomalib_dskd.errors import ArgumentError

__all__ = ["ResultVisualizer", "check_file_names", "common_folder", "verdict"]

CAPTION_HEIGHT = 32  # pixels
CAPTION_SIZE = 20  # pixels; anomalib's smallest font
CAPTION_POSITION = (10, 4)  # pixels from left and top


def verdict(label: object) -> str:
    """Return the word for a predicted or true label; an empty one without a label.

    >>> verdict(True), verdict(False), verdict(None)
    ('anomalous', 'normal', '')
    """
    if label is None:
        return ""
    return "anomalous" if label else "normal"


class ResultVisualizer(ImageVisualizer):
    """anomalib's visualizer, which adds score and verdict and overwrites no file.

    A line above the image has the score, the verdict, and the ground truth where it is known. ``text_config``
    ``{"enable": False}`` leaves it out, as it does all text.

    anomalib's own names files by the image's folder and name only, and gives all runs the same folder: of
    ``camA/img/001.png`` and ``camB/img/001.png``, and of two predictions, it keeps the last one. This one keeps all
    folders below the one that all images of a run have in common, and that one's name. If ``output_dir`` has files, it
    uses ``output_dir_1`` and so on. After the start of a run, ``output_dir`` is the folder of this run.
    """

    _given: str | Path | None = None
    _of_run: str | Path | None = None
    _common: Path | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Choose the folder of this run."""
        self._start(trainer, dataset_paths(trainer.test_dataloaders))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Choose the folder of this run."""
        self._start(trainer, dataset_paths(trainer.predict_dataloaders))

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:  # noqa: ANN401, ARG002
        """Save the images of a batch."""
        for item in batch:
            image = None if item.image_path is None else self.draw(item)
            if image is not None:
                path = self.output_path(item.image_path)
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)

    def on_predict_batch_end(self, *arguments: Any) -> None:  # noqa: ANN401 - as for a test
        """Save the images of a batch."""
        self.on_test_batch_end(*arguments)

    def draw(self, item: Any) -> Image.Image | None:  # noqa: ANN401 - items of images, and of images with depth
        """Return the image for one item of a batch after post-processing; None without anything to show."""
        image = visualize_image_item(
            item,
            fields=self.fields,
            overlay_fields=self.overlay_fields,
            field_size=self.field_size,
            fields_config=self.fields_config,
            overlay_fields_config=self.overlay_fields_config,
            text_config=self.text_config,
        )
        style = dict(self.text_config)
        if image is None or item.pred_score is None or not style.pop("enable"):
            return image
        style["size"] = style["size"] or CAPTION_SIZE
        image = ImageOps.expand(image, (0, CAPTION_HEIGHT, 0, 0))
        return add_text_to_image(image, _caption(item), **style, position=CAPTION_POSITION)

    def output_path(self, image: str | Path) -> Path:
        """Return the file that an image of this run is saved to."""
        path = Path(os.path.abspath(image))
        common = self._common if self._common in path.parents else None
        return Path(self.output_dir or ".") / path.relative_to(common.parent if common else path.anchor)

    def _start(self, trainer: Trainer, images: Iterable[str | Path]) -> None:
        if self.output_dir != self._of_run:  # the first run, or the user has changed it
            self._given = self.output_dir
        folder = Path(self._given or Path(trainer.default_root_dir) / "images")
        self.output_dir = self._of_run = trainer.strategy.broadcast(_unused_folder(folder))
        self._common = common_folder(images)


def check_file_names(visualizer: ImageVisualizer, images: Iterable[str | Path], data: object | None) -> None:
    """Raise if anomalib's visualizer would save two images to one file.

    Args:
        visualizer: of a model.
        images: files of a test or a prediction.
        data: the data module, if there is one.

    Raises:
        ArgumentError: the images, and which visualizer to use.
    """
    if isinstance(visualizer, ResultVisualizer):
        return
    names = {"dataset_name": getattr(data, "name", None), "category": getattr(data, "category", None)}
    paths = sorted({str(path) for path in images})
    files = [generate_output_filename(path, "", **names, mkdir=False) for path in paths]
    repeated = [file for file, count in Counter(files).items() if count > 1]
    if repeated:
        same = [path for path, file in zip(paths, files, strict=True) if file == repeated[0]]
        msg = (
            f"{type(visualizer).__name__} would save the results of {same[0]!r} and {same[1]!r} to the same file, "
            f"'{repeated[0]}'. Use --model.visualizer anomalib_dskd.visualization.ResultVisualizer, which is the "
            "default, or --model.visualizer false."
        )
        raise ArgumentError(msg)


def _caption(item: Any) -> str:  # noqa: ANN401
    caption = f"score {item.pred_score.item():.3f}"
    if item.pred_label is not None:
        caption += f": {verdict(item.pred_label)}"
    return caption if item.gt_label is None else f"{caption} (ground truth: {verdict(item.gt_label)})"


def _unused_folder(folder: Path) -> Path:
    """Return the folder, or the first of ``folder_1``, ``folder_2``, ... if it has files.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as root:
    ...     Path(root, "images").mkdir()
    ...     first = _unused_folder(Path(root, "images")).name
    ...     Path(root, "images", "a.png").touch()
    ...     first, _unused_folder(Path(root, "images")).name
    ('images', 'images_1')
    """
    unused, number = folder, 0
    while unused.exists() and (not unused.is_dir() or any(unused.iterdir())):
        number += 1
        unused = folder.with_name(f"{folder.name}_{number}")
    return unused


def common_folder(images: Iterable[str | Path]) -> Path | None:
    """Return the folder that all images are in; None if they are unknown, or on several drives."""
    folders = {Path(os.path.abspath(image)).parent for image in images}
    try:
        return Path(os.path.commonpath(folders)) if folders else None
    except ValueError:
        return None
