"""When to stop: figures on pseudo-defects, which a factory has, beside those on real ones, as training goes on.

A fifth of the good training tiles is held out, and half of those are damaged by anomalib's synthetic validation split.
Their figures are what a stop can watch; the test set's are there to judge it. ``--variant`` tries what may keep the
students from learning to copy the teacher on defects too.

    python experiments/stopping.py --root datasets/MagneticTile --weights resnet18.tv_in1k.safetensors --seeds 0 1 2
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path

VARIANTS = ("plain", "noise", "dropout", "half embedding", "weight decay", "no gradient")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, required=True, help="folder of the Magnetic Tile Defects data")
parser.add_argument("--weights", required=True, help="file with the weights of resnet18.tv_in1k")
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--every", type=int, default=5, help="epochs between two looks")
parser.add_argument("--schedule", default="constant", choices=["constant", "one_cycle"])
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--size", type=int, default=128, help="height and width")
parser.add_argument("--variant", default="plain", choices=VARIANTS)
parser.add_argument("--precision", default="bf16-mixed", help="of the training")
parser.add_argument("--output", type=Path, help="file to which each look is appended, as a line of JSON")
options = parser.parse_args()
warnings.simplefilter("ignore")

import torch  # noqa: E402 - after the options, for a quick --help
from anomalib.callbacks import ModelCheckpoint  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from lightning import Callback, LightningModule, Trainer, seed_everything  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from anomalib_dskd import Dskd, MagneticTile  # noqa: E402
from anomalib_dskd.evaluation import RawScoreEvaluator  # noqa: E402

FIGURES = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
NOISE = 0.2  # of the embedding's standard deviation
DROPPED = 0.2  # of the embedding's channels
ARGUMENTS: dict[str, dict[str, object]] = {
    "weight decay": {"weight_decay": 1e-4},
    "no gradient": {"embedding_gradient": False},
}


def narrow(_embedding: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
    """Leave half of the channels, always."""
    return embedded * (torch.arange(embedded.shape[1]) < embedded.shape[1] // 2)[:, None, None]


def disturb(_embedding: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
    """Add noise while weights are learnt."""
    if not torch.is_grad_enabled():
        return embedded
    return embedded + NOISE * embedded.detach().std() * torch.randn_like(embedded)


def drop(_embedding: nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
    """Leave out channels at random while weights are learnt."""
    return nn.functional.dropout2d(embedded, DROPPED, training=torch.is_grad_enabled())


HOOKS = {"half embedding": narrow, "noise": disturb, "dropout": drop}


class Curve(Callback):
    """Notes the figures on pseudo-defects."""

    def __init__(self) -> None:
        self.looks: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name in FIGURES}
        self.looks[trainer.current_epoch] = figures


def build(seed: int) -> Dskd:
    model = Dskd(
        teacher_weights=options.weights,
        image_size=options.size,
        schedule=options.schedule,
        learning_rate=options.learning_rate,
        seed=seed,
        evaluator=RawScoreEvaluator(validation=True),
        visualizer=False,
        **ARGUMENTS.get(options.variant, {}),
    )
    if options.variant in HOOKS:
        assert model.model.embedding is not None
        model.model.embedding.register_forward_hook(HOOKS[options.variant])
    return model


def engine(folder: Path, **arguments: object) -> Engine:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, **quiet, **arguments)


def looks(seed: int, folder: Path) -> list[dict[str, object]]:
    """Train, and return the figures of each look: on pseudo-defects, and on the test set."""
    seed_everything(seed, workers=True, verbose=False)  # the pseudo-defects too
    curve = Curve()
    keep = ModelCheckpoint(dirpath=folder / "kept", filename="{epoch}", save_top_k=-1, every_n_epochs=options.every)
    engine(
        folder,
        callbacks=[curve, keep],
        precision=options.precision,
        max_epochs=options.epochs,
        check_val_every_n_epoch=options.every,
    ).fit(build(seed), datamodule=MagneticTile(options.root, val_split_mode="synthetic", val_split_ratio=0.2))
    found = []
    for epoch, pseudo in curve.looks.items():
        (checkpoint,) = (folder / "kept").glob(f"epoch={epoch}.ckpt")
        (real,) = engine(folder).test(
            build(seed), datamodule=MagneticTile(options.root), ckpt_path=checkpoint, verbose=False
        )
        look = {"variant": options.variant, "seed": seed, "epoch": epoch + 1}
        look |= {f"pseudo {name}": pseudo[name] for name in FIGURES} | {name: real[name] for name in FIGURES}
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(look) + "\n")
        found.append(look)
    return found


print(f"{options.variant}, {options.schedule} {options.learning_rate}, {options.epochs} epochs")
print("| seed | epoch | pseudo-defects: image AUROC | pixel AUROC | AUPRO | test: image AUROC | pixel AUROC | AUPRO |")
print("|---|---|---|---|---|---|---|---|")
for seed in options.seeds:
    with tempfile.TemporaryDirectory() as folder:
        curve = looks(seed, Path(folder))
    for look in curve:
        row = [f"{100 * look[name]:.1f}" for name in (*(f"pseudo {name}" for name in FIGURES), *FIGURES)]
        print(f"| {seed} | {look['epoch']} | {' | '.join(row)} |", flush=True)
    best = max(curve, key=lambda look: look["image_AUROC"])
    for name in FIGURES:
        chosen = max(curve, key=lambda look: look[f"pseudo {name}"])
        print(
            f"seed {seed}, largest {name} on pseudo-defects: epoch {chosen['epoch']} with image AUROC "
            f"{100 * chosen['image_AUROC']:.1f}; the best, epoch {best['epoch']}, has {100 * best['image_AUROC']:.1f}",
            flush=True,
        )
