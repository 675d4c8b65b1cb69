"""Accuracy of a trained DSKD's compressed OpenVINO exports on the test set of Magnetic Tile Defects.

The last column is the number of images whose labels differ from those of the same export in FP32.

python experiments/compression_accuracy.py --root datasets/MagneticTile --checkpoint model.ckpt
"""

import tempfile

import common
import numpy as np
import openvino
import torch
from anomalib.deploy import CompressionType
from torchvision.transforms.v2 import Resize
from torchvision.tv_tensors import Image, Mask

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.benchmark.job_result import Metrics
from anomalib_dskd.benchmark.predictions import Predictions, compute_metrics

COMPRESSIONS: dict[str, CompressionType | None] = {
    "f32": None,
    "FP16 weights": CompressionType.FP16,
    "INT8 weights": CompressionType.INT8,
    "INT8": CompressionType.INT8_PTQ,
}
PRECISIONS = ("f32", "bf16")

parser = common.option_parser(__doc__, "--root", "--checkpoint", "--batch", batch=8)
parser.add_argument("--only", nargs="+", choices=COMPRESSIONS, default=list(COMPRESSIONS), help="these exports only")
options = parser.parse_args()

model = Dskd.load_from_checkpoint(options.checkpoint, map_location="cpu")
if model.input_size is None:
    parser.error("the checkpoint's model has a custom pre-processor: its image size is unknown")
model.post_processor.enable_normalization = False  # it clamps, and metrics are those of unclamped scores
data = MagneticTile(options.root)
data.setup("test")
resize = Resize(model.input_size, antialias=True)
images, masks, labels = [], [], []
for item in data.test_data:
    image, mask = resize(Image(item.image), Mask(item.gt_mask))
    images.append(image.numpy())
    masks.append(mask.numpy())
    labels.append(int(item.gt_label))


def evaluate(compiled: openvino.CompiledModel) -> tuple[Metrics, np.ndarray]:
    """Return the metrics of a compiled model on the test set, and its labels."""
    scores, maps, predicted = [], [], []
    for start in range(0, len(images), options.batch):
        result = compiled([np.stack(images[start : start + options.batch])])
        scores.append(result["pred_score"].reshape(-1))
        maps.append(result["anomaly_map"].reshape(-1, *model.input_size))
        predicted.append(result["pred_label"].reshape(-1))
    metrics = compute_metrics(
        Predictions(
            paths=[""] * len(images),
            labels=np.array(labels),
            classes=[""] * len(images),
            scores=np.concatenate(scores),
            maps=np.concatenate(maps),
            masks=np.stack(masks).reshape(-1, *model.input_size).astype(np.uint8),
        )
    )
    return metrics, np.concatenate(predicted)


core = openvino.Core()
common.print_header("export", "inference precision", *common.BENCHMARK_METRICS.values(), "other labels")
for name in options.only:
    compression = COMPRESSIONS[name]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = model.to_openvino(
            folder,
            input_size=model.input_size,
            compression_type=compression,
            datamodule=MagneticTile(options.root) if compression == CompressionType.INT8_PTQ else None,
        )
        network = core.read_model(path)
        network.reshape([-1, 3, *model.input_size])
        evaluated = {
            precision: evaluate(core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": precision}))
            for precision in PRECISIONS
        }
        _, expected = evaluated["f32"]
        for precision, (metrics, predicted) in evaluated.items():
            cells = common.metric_cells(metrics, digits=2)
            common.print_row(name, precision, *cells, int((predicted != expected).sum()))
        del network  # its file is removed with the folder
