"""Thresholds and normalization of a quantized model, set from its own scores of the validation images.

Quantization shifts scores, so that thresholds of the floating-point model would miss defects or call normal images
anomalous. The model is therefore exported and quantized without its post-processor, scores the validation images as in
training, and gets a post-processor with the thresholds that follow.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from anomalib.data import AnomalibDataModule, ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from anomalib_dskd.data.data_module_checks import check_validation_images
from anomalib_dskd.data.resizing import resize_for_export

if TYPE_CHECKING:
    import openvino

__all__ = ["append_post_processor", "recalibrated", "recalibration", "validation_images"]

Validation = Iterable[tuple[Tensor, ImageBatch]]


def recalibration(
    data: AnomalibDataModule,
    pre_processor: nn.Module | None,
    post_processor: PostProcessor,
    size: tuple[int, int] | None,
) -> "Callable[[openvino.Model], openvino.Model]":
    """Return a function that appends the recalibrated post-processor to a quantized network.

    Args:
        data: data module with the validation images of training.
        pre_processor: the model's.
        post_processor: the model's.
        size: height and width that the exported model takes; None for any.

    Raises:
        ArgumentError: there are no validation images.
    """
    data.setup(TrainerFn.FITTING)
    check_validation_images(data)  # before the minutes that the quantization takes

    def finish(network: "openvino.Model") -> "openvino.Model":
        images = validation_images(data, pre_processor, size)
        return append_post_processor(network, recalibrated(post_processor, network, images))

    return finish


def validation_images(
    data: AnomalibDataModule, pre_processor: nn.Module | None, size: tuple[int, int] | None
) -> Iterator[tuple[Tensor, ImageBatch]]:
    """Yield each validation image as an exported model takes it, and its labels as a post-processor takes them.

    Args:
        data: data module with validation images, which has been set up.
        pre_processor: the model's, which resizes masks to the size of anomaly maps.
        size: height and width that the exported model takes; None for any.

    Yields:
        An image ``(1, 3, H, W)`` in [0, 1], and a batch of one with its label and mask.
    """
    for index in range(len(data.val_data)):
        batch = data.val_data.collate_fn([data.val_data[index]])
        image = torch.as_tensor(batch.image)
        if isinstance(pre_processor, PreProcessor) and pre_processor.transform is not None:
            batch.image, batch.gt_mask = pre_processor.transform(batch.image, batch.gt_mask)
        yield resize_for_export(image, size), batch


def recalibrated(post_processor: PostProcessor, network: "openvino.Model", images: Validation) -> PostProcessor:
    """Return a copy of a post-processor with thresholds and normalization that fit a network's scores.

    The network runs as OpenVINO chooses by default on this processor.

    Args:
        post_processor: of the floating-point model.
        network: exported model without a post-processor.
        images: see :func:`validation_images`.
    """
    import openvino  # noqa: PLC0415 - an extra

    compiled = openvino.Core().compile_model(network, "CPU")
    result = copy.deepcopy(post_processor)
    for image, batch in images:
        predicted = compiled(image.numpy())
        score, anomaly_map = (torch.from_numpy(predicted[name].copy()) for name in ("pred_score", "anomaly_map"))
        batch.update(pred_score=score, anomaly_map=anomaly_map)
        result.on_validation_batch_end(None, None, batch)  # type: ignore[arg-type] # it uses no Trainer and no model
    result.on_validation_epoch_end(None, None)  # type: ignore[arg-type]
    return result


class _PostProcessing(nn.Module):
    """A post-processor whose inputs and outputs are tensors."""

    def __init__(self, post_processor: PostProcessor) -> None:
        super().__init__()
        self.post_processor = post_processor

    def forward(self, pred_score: Tensor, anomaly_map: Tensor) -> dict[str, Tensor]:
        """Return the results that are not None by name."""
        result = self.post_processor(InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map))
        return {name: value for name, value in result._asdict().items() if value is not None}


def append_post_processor(network: "openvino.Model", post_processor: PostProcessor) -> "openvino.Model":
    """Return an exported network followed by a post-processor.

    Args:
        network: with outputs ``pred_score`` ``(B, 1)`` and ``anomaly_map`` ``(B, 1, H, W)``.
        post_processor: with thresholds and normalization.

    Returns:
        A model with the outputs of an export that had this post-processor.
    """
    import openvino  # noqa: PLC0415 - an extra

    module = _PostProcessing(post_processor).eval()
    example = {"pred_score": torch.zeros(2, 1), "anomaly_map": torch.zeros(2, 1, 8, 8)}
    names = list(module(**example))
    any_size = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    shapes = {"pred_score": {0: torch.export.Dim.AUTO}, "anomaly_map": any_size}
    exported = torch.export.export(module, (), example, dynamic_shapes=shapes)
    tail = openvino.convert_model(exported)
    for parameter, name in zip(tail.get_parameters(), example, strict=True):
        parameter.output(0).replace(network.output(name).get_node().input_value(0))
    for output, name in zip(tail.outputs, names, strict=True):
        output.get_tensor().set_names({name})
    whole = openvino.Model(tail.get_results(), network.get_parameters(), network.get_friendly_name())
    whole.validate_nodes_and_infer_types()  # sizes of the outputs
    return whole
