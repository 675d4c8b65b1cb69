"""Report of a test or a prediction: score and verdict of each image, and where the images with anomaly maps are."""

import logging
import os
from pathlib import Path
from typing import Any

import pandas as pd
import torch.distributed
from anomalib.visualization import ImageVisualizer
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from anomalib_dskd.file_writing import write_file
from anomalib_dskd.models.distillation.command import runs_in_command
from anomalib_dskd.visualization import common_folder, verdict

__all__ = ["ReportPredictions", "print_table"]

logger = logging.getLogger(__name__)

FILE_NAME = "predictions.csv"
MAX_ROWS = 20  # of the table on the screen


class ReportPredictions(Callback):
    """Writes ``predictions.csv`` next to the images with anomaly maps; anomalib's command prints a table too.

    The file has a line per image: file, score, verdict (``anomalous`` or ``normal``, empty without a threshold), and in
    a test the ground truth. Without a visualizer, Python writes none, and the command writes it to the folder of
    results. The callback comes after anomalib's post-processor, which normalizes the scores.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Forget an earlier test, and in the command, which does not use them, keep no predictions in memory."""
        self.rows = []
        if stage == TrainerFn.PREDICTING and runs_in_command():
            trainer.predict_loop.return_predictions = False

    def on_test_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401
        *_: object,
    ) -> None:
        """Record the post-processed results of a batch."""
        if outputs.image_path is None:  # images that come from no file
            return
        labels, truths = outputs.pred_label, outputs.gt_label
        for index, (path, score) in enumerate(zip(outputs.image_path, outputs.pred_score.reshape(-1), strict=True)):
            row = {"file": str(path), "score": score.item()}
            row["verdict"] = verdict(None if labels is None else labels.reshape(-1)[index])
            if truths is not None:
                row["ground_truth"] = verdict(truths.reshape(-1)[index])
            self.rows.append(row)

    on_predict_batch_end = on_test_batch_end  # type: ignore[assignment] # other names of the same arguments

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Collect the results of all processes."""
        if trainer.world_size > 1:
            parts: list[list[dict[str, Any]]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self.rows)
            self.rows = [row for part in parts for row in part]

    on_predict_end = on_test_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, and report it below the table of metrics."""
        is_complete = stage in {TrainerFn.TESTING, TrainerFn.PREDICTING} and not trainer.interrupted
        if not (is_complete and trainer.is_global_zero and self.rows):
            return
        # several processes read some images twice, to have equal numbers
        results = pd.DataFrame(self.rows).drop_duplicates("file").sort_values("file")
        if runs_in_command():
            print_table(results)
        visualizer = getattr(pl_module, "visualizer", None)
        images = visualizer.output_dir if isinstance(visualizer, ImageVisualizer) else None
        folder = trainer.default_root_dir if images is None and runs_in_command() else images
        if folder is not None:
            # names that are no text keep their bytes
            write_file(Path(folder) / FILE_NAME, results.to_csv(index=False).encode(errors="surrogateescape"))
            logger.info("Scores: %s", Path(folder) / FILE_NAME)
        if images is not None:
            logger.info("Images with anomaly maps: %s", images)


def print_table(results: pd.DataFrame) -> None:
    """Print the images with the highest scores, with their names below the folder that contains all of them."""
    root = common_folder(results["file"])
    table = Table(*(Column(name, overflow="fold") for name in results.columns))
    highest = results.sort_values("score", ascending=False, kind="stable").head(MAX_ROWS)
    for file, score, *labels in highest.itertuples(index=False):
        shown = file if root is None else os.path.relpath(file, root)
        name = os.fsencode(shown).decode(errors="replace")
        table.add_row(Text(name), f"{score:.3f}", *labels)
    console = Console()
    console.print(table)
    number = (results["verdict"] == "anomalous").sum()
    more = f"; the {MAX_ROWS} highest scores are shown" if len(results) > MAX_ROWS else ""
    console.print(f"{number} of {len(results)} images are anomalous{more}", highlight=False)
