"""Heatmaps: anomalib's images of results, with score and verdict."""

from pathlib import Path
from typing import Any

from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import add_text_to_image
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning import LightningModule, Trainer
from PIL import Image, ImageOps

__all__ = ["ScoreVisualizer", "verdict"]

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


class ScoreVisualizer(ImageVisualizer):
    """anomalib's visualizer, which adds a line with score and verdict, and the ground truth where it is known.

    ``text_config`` ``{"enable": False}`` leaves the line out, as it does all text.
    """

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

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: object,  # noqa: ARG002
        batch: Any,  # noqa: ANN401 - of images, or of images with depth
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Save each item's image in the file that anomalib chooses; a prediction does so too."""
        if self.output_dir is None:
            self.output_dir = Path(trainer.default_root_dir) / "images"
        data = getattr(trainer, "datamodule", None)
        for item in batch:
            image = self.draw(item)
            if image is not None:
                name, category = getattr(data, "name", None), getattr(data, "category", None)
                image.save(generate_output_filename(item.image_path or "", self.output_dir, name, category))


def _caption(item: Any) -> str:  # noqa: ANN401
    caption = f"score {item.pred_score.item():.3f}"
    if item.pred_label is not None:
        caption += f": {verdict(item.pred_label)}"
    return caption if item.gt_label is None else f"{caption} (ground truth: {verdict(item.gt_label)})"
