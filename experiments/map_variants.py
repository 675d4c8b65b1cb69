"""Metrics of one trained DSKD with other pairs, levels and blurs of the anomaly map (tables 7 and 9 of the paper).

No model is trained. The checkpoint's model must have been trained with both losses. A row whose pair the paper trains
with one loss is not comparable with the paper's row.

    python experiments/map_variants.py --root datasets/MagneticTile --checkpoint model.ckpt
"""

import tempfile
from pathlib import Path

import common

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.benchmark.predictions import ScoreRecorder, compute_metrics, compute_metrics_by_class

VARIANTS: dict[str, dict[str, object]] = {
    "as trained": {},
    "T-E": {"map_pair": "T-E"},
    "E-D": {"map_pair": "E-D"},
    "M1": {"map_layers": [1]},
    "M2": {"map_layers": [2]},
    "M3": {"map_layers": [3]},
    "M1-2": {"map_layers": [1, 2]},
    "M2-3": {"map_layers": [2, 3]},
    "context 4": {"context_weight": 4.0},
    "no blur": {"sigma": 0.0},
    "sigma 1": {"sigma": 1.0},
    "sigma 2": {"sigma": 2.0},
    "sigma 8": {"sigma": 8.0},
}

options = common.option_parser(__doc__, "--root", "--checkpoint").parse_args()
trained = Dskd.load_from_checkpoint(options.checkpoint, map_location="cpu")
weights = {name: value for name, value in trained.state_dict().items() if not name.startswith("evaluator.")}
common.print_header("map", *common.BENCHMARK_METRICS.values(), "AUPRO per kind of defect")
for name, arguments in VARIANTS.items():
    model = Dskd(**{**trained.hparams, **arguments, **common.NO_EVALUATION})
    model.load_state_dict(weights)
    data = MagneticTile(options.root)
    with tempfile.TemporaryDirectory() as folder:
        recorder = ScoreRecorder(Path(folder))
        common.quiet_engine(folder, callbacks=[recorder]).test(model, datamodule=data, verbose=False)
        labels = dict(zip(data.test_data.samples.image_path, data.test_data.samples.label, strict=True))
        predictions = recorder.predictions(labels)
        by_class = compute_metrics_by_class(predictions).items()
        kinds = ", ".join(f"{kind} {common.percent(values.AUPRO)}" for kind, values in by_class)
        common.print_row(name, *common.metric_cells(compute_metrics(predictions)), kinds)
