"""What the map is made of: one trained DSKD, tested with other pairs, levels and blurs (tables 7 and 9 of the paper).

Nothing is trained. The model must have been trained with both losses. A pair's row is not the paper's where that also
leaves out a loss.

    python experiments/map_variants.py --root datasets/MagneticTile --checkpoint model.ckpt
"""

import argparse
import tempfile
import warnings
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, required=True, help="folder of the Magnetic Tile Defects data")
parser.add_argument("--checkpoint", type=Path, required=True, help="a trained anomalib_dskd.Dskd")
options = parser.parse_args()
warnings.simplefilter("ignore")

from anomalib.engine import Engine  # noqa: E402 - after the options, for a quick --help

from anomalib_dskd import Dskd, MagneticTile  # noqa: E402
from anomalib_dskd.benchmark.predictions import ScoreRecorder, figures, figures_by_class  # noqa: E402

VARIANTS: dict[str, dict[str, object]] = {
    "as trained": {},
    "T-E": {"map_pair": "T-E"},
    "E-D": {"map_pair": "E-D"},
    "M1": {"map_layers": [1]},
    "M2": {"map_layers": [2]},
    "M3": {"map_layers": [3]},
    "M1-2": {"map_layers": [1, 2]},
    "M2-3": {"map_layers": [2, 3]},
    "no blur": {"sigma": 0.0},
    "sigma 1": {"sigma": 1.0},
    "sigma 2": {"sigma": 2.0},
    "sigma 8": {"sigma": 8.0},
}


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}"


trained = Dskd.load_from_checkpoint(options.checkpoint, map_location="cpu")
learnt = {name: value for name, value in trained.state_dict().items() if not name.startswith("evaluator.")}
print(
    "| map | image AUROC | image F1 | pixel AUROC | AUPRO | AUPRO of each kind of defect |\n|---|---|---|---|---|---|"
)
for name, arguments in VARIANTS.items():
    model = Dskd(**{**trained.hparams, **arguments}, visualizer=False, evaluator=False)
    model.load_state_dict(learnt)
    recorder, data = ScoreRecorder(), MagneticTile(options.root)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder, callbacks=[recorder], accelerator="cpu", logger=False, enable_progress_bar=False
        )
        engine.test(model, datamodule=data, verbose=False)
    labels = dict(zip(data.test_data.samples.image_path, data.test_data.samples.label, strict=True))
    predictions = recorder.predictions(labels)
    row = [percent(value) for value in figures(predictions).values()]
    kinds = ", ".join(f"{kind} {percent(values['AUPRO'])}" for kind, values in figures_by_class(predictions).items())
    print(f"| {name} | {' | '.join(row)} | {kinds} |", flush=True)
