"""What compression costs in accuracy: a trained DSKD's OpenVINO exports on the whole test set of Magnetic Tile Defects.

python experiments/compression_accuracy.py --root datasets/MagneticTile --checkpoint model.ckpt
"""

import argparse
import tempfile
import warnings
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, required=True, help="folder of the Magnetic Tile Defects data")
parser.add_argument("--checkpoint", type=Path, required=True, help="a trained anomalib_dskd.Dskd")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--only", nargs="+", choices=["f32", "FP16 weights", "INT8 weights", "INT8"], help="not all")
options = parser.parse_args()
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402 - after the options, for a quick --help
import openvino  # noqa: E402
import torch  # noqa: E402
from anomalib.deploy import CompressionType  # noqa: E402
from torchvision.transforms.v2 import Resize  # noqa: E402
from torchvision.tv_tensors import Image, Mask  # noqa: E402

from anomalib_dskd import Dskd, MagneticTile  # noqa: E402
from anomalib_dskd.benchmark.predictions import Predictions, figures  # noqa: E402

COMPRESSIONS: dict[str, CompressionType | None] = {
    "f32": None,
    "FP16 weights": CompressionType.FP16,
    "INT8 weights": CompressionType.INT8,
    "INT8": CompressionType.INT8_PTQ,
}
PRECISIONS = ("f32", "bf16")

model = Dskd.load_from_checkpoint(options.checkpoint, map_location="cpu")
if model.input_size is None:
    parser.error("the checkpoint's model has a pre-processor of its own: no size to test at is known")
model.post_processor.enable_normalization = False  # it clamps, and figures are those of unclamped scores
data = MagneticTile(options.root)
data.setup("test")
resize = Resize(model.input_size, antialias=False)
images, masks, labels = [], [], []
for item in data.test_data:
    image, mask = resize(Image(item.image), Mask(item.gt_mask))
    images.append(image.numpy())
    masks.append(mask.numpy())
    labels.append(int(item.gt_label))


def evaluate(compiled: openvino.CompiledModel) -> dict[str, float | None]:
    scores, maps = [], []
    for start in range(0, len(images), options.batch):
        result = compiled([np.stack(images[start : start + options.batch])])
        scores.append(result["pred_score"].reshape(-1))
        maps.append(result["anomaly_map"].reshape(-1, *model.input_size))
    return figures(
        Predictions(
            paths=[""] * len(images),
            labels=np.array(labels),
            classes=[""] * len(images),
            scores=np.concatenate(scores),
            maps=np.concatenate(maps),
            masks=np.stack(masks).reshape(-1, *model.input_size).astype(np.uint8),
        )
    )


print(
    "| weights and activations | the rest | image AUROC | image F1 | pixel AUROC | AUPRO |\n|---|---|---|---|---|---|"
)
for name, compression in COMPRESSIONS.items():
    if options.only and name not in options.only:
        continue
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = model.to_openvino(
            folder,
            input_size=model.input_size,
            compression_type=compression,
            datamodule=MagneticTile(options.root) if compression == CompressionType.INT8_PTQ else None,
        )
        network = openvino.Core().read_model(path)
        network.reshape([-1, 3, *model.input_size])
        for precision in PRECISIONS:
            compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": precision})
            row = " | ".join("n/a" if value is None else f"{100 * value:.2f}" for value in evaluate(compiled).values())
            print(f"| {name} | {precision} | {row} |", flush=True)
        del network
