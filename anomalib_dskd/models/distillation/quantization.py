"""INT8 quantization of exported OpenVINO models: of the networks, not of the anomaly map.

anomalib's own ``int8_ptq`` quantizes the anomaly map too, where ``1 - cos`` of normal pixels is smaller than an INT8
step, so that all images have the same score; and it calibrates on validation images, which may contain defects. This
module works around both; ``tests/integration/test_quantization.py`` tells when that is no longer needed.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray

from anomalib_dskd.components.pseudo_defects import PseudoDefects
from anomalib_dskd.data.resizing import resize_for_export
from anomalib_dskd.errors import ArgumentError

if TYPE_CHECKING:
    import openvino

__all__ = [
    "CALIBRATION_IMAGES",
    "calibration_images",
    "first_convolutions",
    "map_operations",
    "quantize_networks",
]

CALIBRATION_IMAGES = 300  # NNCF's own default
CHANNELS = 3


def quantize_networks(model: "openvino.Model", images: Iterable[NDArray[np.float32]]) -> "openvino.Model":
    """Quantize weights and activations of the networks, except for their first convolutions and the anomaly map.

    Args:
        model: an exported detector.
        images: calibration images ``(1, 3, H, W)`` from :func:`calibration_images`.

    Returns:
        The quantized model.

    Raises:
        ArgumentError: the model has no anomaly map of cosines.
    """
    import nncf  # noqa: PLC0415 - an extra
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet  # noqa: PLC0415

    return cast(
        "openvino.Model",
        nncf.quantize(
            model,
            nncf.Dataset(list(images)),
            subset_size=CALIBRATION_IMAGES,
            ignored_scope=nncf.IgnoredScope(names=[*first_convolutions(model), *map_operations(model)]),
            # one image can activate a decoder some sixty times as strongly as the others: NNCF's means over images, of
            # ranges and biases, would follow it, and leave few steps for the others
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=RangeEstimatorParametersSet.MEDIAN_MINMAX,
                disable_bias_correction=True,
            ),
        ),
    )


def first_convolutions(model: "openvino.Model") -> list[str]:
    """Return the names of the convolutions that read images: a small part of the time, a large one of the error."""
    return [
        operation.get_friendly_name()
        for operation in model.get_ops()
        if operation.get_type_name() == "Convolution" and operation.input(1).get_partial_shape()[1] == CHANNELS
    ]


def map_operations(model: "openvino.Model") -> list[str]:
    """Return the names of the operations between the networks' features and the outputs.

    They are found backwards from the outputs, up to the features, which are the inputs of L2 norms.

    Raises:
        ArgumentError: no norms are found.
    """
    found: set[str] = set()
    features: set[str] = set()
    waiting = [result.input_value(0).get_node() for result in model.get_results()]
    while waiting:
        operation = waiting.pop()
        name = operation.get_friendly_name()
        if name in found or name in features:
            continue
        consumers = [target.get_node() for output in operation.outputs() for target in output.get_target_inputs()]
        if any(consumer.get_type_name() == "ReduceL2" for consumer in consumers):
            features.add(name)
            continue
        found.add(name)
        if operation.get_type_name() != "ShapeOf":  # which reads a shape, not values
            waiting.extend(value.get_node() for value in operation.input_values())
    if not features:
        msg = (
            "the model has no cosine between features, by which its networks and its anomaly map are told apart. "
            "Supported: exports of this package's models."
        )
        raise ArgumentError(msg)
    types = {operation.get_friendly_name(): operation.get_type_name() for operation in model.get_ops()}
    return sorted(name for name in found if types[name] not in {"Constant", "Parameter", "Result"})


def calibration_images(data: AnomalibDataModule, size: tuple[int, int] | None) -> Iterator[NDArray[np.float32]]:
    """Yield random training images ``(1, 3, H, W)`` in [0, 1] from a fixed seed, every second one damaged.

    Calibration on normal images only would clip the activations of defects.

    Args:
        data: data module with normal training images.
        size: height and width to resize to, as the exported model does; None keeps the size.
    """
    data.setup(TrainerFn.FITTING)  # as a Trainer does, so that a data module that has trained a model keeps its splits
    order = torch.randperm(len(data.train_data), generator=torch.Generator().manual_seed(0))
    pseudo_defects = PseudoDefects(mean=[0.0] * 3, std=[1.0] * 3, seed=0)  # images are not normalized yet
    for number, index in enumerate(order[:CALIBRATION_IMAGES].tolist()):
        image = resize_for_export(torch.as_tensor(data.train_data[index].image)[None], size)  # (1, 3, H, W)
        if number % 2:
            image, _ = pseudo_defects(image, None, epoch=0)
        yield cast("NDArray[np.float32]", image.numpy())
