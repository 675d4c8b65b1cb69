"""What an average of the weights brings: figures with it and with the last step's weights, of the same training.

A fifth of the good training tiles is held out; their loss, of both students, tells which weights are better without a
defect. The test set's figures are there to judge that.

    python experiments/weight_average.py --root PATH --weights resnet18.tv_in1k.safetensors --seeds 0 1 2
"""

import argparse
import tempfile
import warnings
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, required=True, help="folder of the Magnetic Tile Defects data")
parser.add_argument("--weights", required=True, help="file with the weights of resnet18.tv_in1k")
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--every", type=int, default=10, help="epochs between two looks")
parser.add_argument("--decay", type=float, default=0.99)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--size", type=int, default=128, help="height and width")
parser.add_argument("--precision", default="bf16-mixed", help="of the training")
options = parser.parse_args()
if not 0 < options.decay < 1:
    parser.error(f"--decay {options.decay}: must be larger than 0 and smaller than 1")
warnings.simplefilter("ignore")

import torch  # noqa: E402 - after the options, for a quick --help
from anomalib.engine import Engine  # noqa: E402
from lightning import Callback, Trainer  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from anomalib_dskd import Dskd, MagneticTile  # noqa: E402

FIGURES = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")


class KeepBoth(Callback):
    """Keeps the averaged weights and those of the last step, each with its own batch-norm statistics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: Dskd) -> None:
        epoch = trainer.current_epoch + 1
        assert pl_module.weight_average is not None  # until the training ends
        torch.save(pl_module.model.state_dict(), self.folder / f"{epoch} average")
        pl_module.weight_average.put_back()
        pl_module.estimate_batch_norm(pl_module.model, pl_module.run_students)
        torch.save(pl_module.model.state_dict(), self.folder / f"{epoch} last step")


def build(seed: int) -> Dskd:
    return Dskd(
        teacher_weights=options.weights,
        image_size=options.size,
        learning_rate=options.learning_rate,
        ema_decay=options.decay,
        seed=seed,
        visualizer=False,
    )


def engine(folder: Path, **arguments: object) -> Engine:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, **quiet, **arguments)


def data() -> MagneticTile:
    return MagneticTile(options.root, val_split_mode="from_train", val_split_ratio=0.2)


@torch.no_grad()
def held_out_loss(model: Dskd, loader: DataLoader) -> float:
    """Mean over the images of the sum of both students' losses."""
    total = 0.0
    for batch in loader:
        batch.image = model.pre_processor(batch.image)
        total += float(sum(model.compute_losses(batch).values())) * len(batch.image)
    return total / len(loader.dataset)


print(f"learning rate {options.learning_rate}, decay {options.decay}, {options.epochs} epochs")
print("| seed | epoch | weights | held-out loss | image AUROC | pixel AUROC | AUPRO |")
print("|---|---|---|---|---|---|---|", flush=True)
for seed in options.seeds:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine(
            folder,
            callbacks=[KeepBoth(folder)],
            precision=options.precision,
            max_epochs=options.epochs,
            check_val_every_n_epoch=options.every,
        ).fit(build(seed), datamodule=data())
        tiles = data()
        tiles.setup()
        for epoch in range(options.every, options.epochs + 1, options.every):
            for weights in ("last step", "average"):
                model = build(seed)
                model.model.load_state_dict(torch.load(folder / f"{epoch} {weights}"))
                model.eval()
                (real,) = engine(folder).test(model, datamodule=tiles, verbose=False)  # images are resized from here on
                loss = held_out_loss(model, tiles.val_dataloader())
                row = " | ".join(f"{100 * real[name]:.1f}" for name in FIGURES)
                print(f"| {seed} | {epoch} | {weights} | {loss:.4f} | {row} |", flush=True)
