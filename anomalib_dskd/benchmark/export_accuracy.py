"""Accuracy of the labels that a model exported to OpenVINO gives, by the threshold that it contains."""

from pathlib import Path

import numpy as np
import torch
from anomalib.data import AnomalibDataModule

from anomalib_dskd.benchmark.predictions import label_f1
from anomalib_dskd.data.resizing import resize_for_export

__all__ = ["exported_f1"]


def exported_f1(path: Path, data: AnomalibDataModule, size: tuple[int, int]) -> float | None:
    """Return the F1 score of an exported model's labels of the test images.

    Args:
        path: the ``.xml`` file.
        data: data module whose test set has been set up.
        size: height and width that the exported model takes.

    Returns:
        A fraction; None if the model gives no labels, or the test set has only one kind of image.
    """
    import openvino  # noqa: PLC0415 - optional dependency

    compiled = openvino.Core().compile_model(path, "CPU")
    if "pred_label" not in {output.get_any_name() for output in compiled.outputs}:
        return None
    predicted, truth = [], []
    for index in range(len(data.test_data)):
        item = data.test_data[index]
        image = resize_for_export(torch.as_tensor(item.image)[None], size)  # (1, 3, H, W)
        predicted.append(bool(compiled(image.numpy())["pred_label"].item()))
        truth.append(bool(item.gt_label))
    return label_f1(np.array(predicted), np.array(truth))
