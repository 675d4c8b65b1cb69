"""Image of the README, predictions of the quick start's model, and plot of docs/results.md, accuracy against latency.

``docs/images/quickstart.png`` shows the first test image of some kinds of defect; it needs the quick start's model.
``docs/images/accuracy_latency.png`` is drawn from the CSV file of the same name.

    anomalib train --config configs/quickstart.yaml
    python experiments/readme_images.py --checkpoint results/.../model.ckpt
"""

from pathlib import Path

import common
import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from anomalib_dskd import Dskd, TextureDefects

IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLUMNS = ("Input", "Ground truth", "Anomaly map", "Predicted outline")
COLORS = {"anomalib_dskd": ("this plugin", "#0969da"), "anomalib": ("anomalib", "#bc4c00")}
ROWS = 3  # kinds of defect
LEFT_LABELS = {"DTGD", "PaDiM"}  # their neighbors' labels are on the right


@torch.no_grad()
def draw_predictions(checkpoint: Path, path: Path) -> None:
    """Draw input, mask, anomaly map and predicted outline of the first test image of each kind of defect."""
    model = Dskd.load_from_checkpoint(checkpoint).eval()
    data = TextureDefects()
    data.prepare_data()
    data.setup("test")
    defective = data.test_data.samples[data.test_data.samples.label_index == 1]
    chosen = defective.groupby("label").head(1).index[:ROWS]
    figure = Figure(figsize=(8, 2 * len(chosen) + 0.3), layout="constrained")
    for axes, index in zip(figure.subplots(len(chosen), len(COLUMNS), squeeze=False), chosen, strict=True):
        item = data.test_data[int(index)]
        image = item.image[None]
        result = model(image)
        size = image.shape[-2:]
        maps = torch.nn.functional.interpolate(result.anomaly_map, size=size, mode="bilinear")[0, 0]
        masks = torch.nn.functional.interpolate(result.pred_mask.float(), size=size, mode="nearest")[0, 0]
        pixels = image[0].permute(1, 2, 0)
        for axis in axes:
            axis.imshow(pixels)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(data.test_data.samples.label[index].replace("_", " "))
        axes[1].imshow(item.gt_mask.squeeze(), cmap="gray")
        axes[2].imshow(maps, cmap="jet", alpha=0.5, vmin=0, vmax=1)
        axes[3].contour(masks, levels=[0.5], colors="#ff2d55", linewidths=2)
    for axis, title in zip(figure.axes, COLUMNS, strict=False):
        axis.set_title(title)
    figure.savefig(path, dpi=100)


def draw_accuracy_against_latency(table: pd.DataFrame, path: Path) -> None:
    """Draw image AUROC against OpenVINO latency; the best detectors are in the upper left corner."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes: Axes = figure.subplots()
    measured = table.dropna(subset="openvino_ms")
    for package, (name, color) in COLORS.items():
        rows = measured[measured.package == package]
        axes.scatter(rows.openvino_ms, rows.image_AUROC, s=60, color=color, label=name, zorder=3)
    for row in measured.itertuples():
        is_left = row.model in LEFT_LABELS
        axes.annotate(
            row.model if row.epochs == 1 else f"{row.model}, {row.epochs} epochs",
            (row.openvino_ms, row.image_AUROC),
            xytext=(-8 if is_left else 8, 0),
            textcoords="offset points",
            ha="right" if is_left else "left",
            va="center",
            fontsize=9,
        )
    axes.set(xlabel="OpenVINO latency, ms per image (FP32, 128x128)", ylabel="image AUROC, %", xlim=(5, 34))
    axes.grid(color="#e4e7eb")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    left_out = ", ".join(table.model[table.openvino_ms.isna()])
    figure.supxlabel(
        f"Magnetic Tile Defects. Without a latency from the same run: {left_out}.", fontsize=8, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=110)


parser = common.option_parser(__doc__, "--checkpoint")
options = parser.parse_args()
mpl.rcParams["font.size"] = 10
draw_predictions(options.checkpoint, IMAGES / "quickstart.png")
draw_accuracy_against_latency(
    pd.read_csv(IMAGES / "accuracy_latency.csv", comment="#"), IMAGES / "accuracy_latency.png"
)
