"""Latency and throughput in OpenVINO, in FP32, BF16 and INT8, of DSKD, its siblings and anomalib's models.

Models are measured interleaved: every round measures each model, so that a slow period of the machine affects all of
them. The weights do not influence the time, so each model is trained on one batch only. Floating-point layers run in
FP32 (``INFERENCE_PRECISION_HINT``), or in BF16 where the row says so; processors without BF16 units ignore the hint.

    python experiments/inference_speed.py --root datasets/MagneticTile --weights resnet18.tv_in1k.safetensors
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import common
import numpy as np
import openvino
import torch
from anomalib.deploy import CompressionType
from anomalib.models import Padim, ReverseDistillation, Stfpm
from anomalib.models.components import AnomalibModule, GaussianBlur2d
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from anomalib_dskd import Afkd, Dskd, Dtgd, MagneticTile, Tad
from anomalib_dskd.benchmark.speed import measure_cost
from anomalib_dskd.benchmark.timing import images_per_second
from anomalib_dskd.components.anomaly_map import AnomalyMapGenerator, sum_of_levels
from anomalib_dskd.models.distillation.lightning_model import DistillationModule
from anomalib_dskd.models.distillation.quantization import map_operations

MIB = 2**20
INT8 = CompressionType.INT8_PTQ
PROFILED = ("DSKD, map as in the paper", "DSKD", "DSKD, INT8")
BATCH_SECONDS = 3.0  # of each measurement of throughput

parser = common.option_parser(__doc__, "--root", "--weights", "--size", "--rounds", size=256)
parser.add_argument("--runs", type=int, default=20, help="images per round and model")
parser.add_argument("--only", nargs="+", metavar="MODEL", help="rows of the table to measure, besides DSKD and STFPM")
parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="batch sizes to try for throughput")
options = parser.parse_args()
SIZE = (options.size, options.size)
core = openvino.Core()


@dataclass(frozen=True)
class Export:
    """An exported model.

    Attributes:
        path: of the ``.xml`` file.
        macs: multiply-adds per image.
        map_operations: names of the operations of the anomaly map; empty for anomalib's models.
        precision: of floating-point layers.
    """

    path: Path
    macs: int
    map_operations: set[str]
    precision: str

    @property
    def mib(self) -> float:
        """Size of both files, in MiB."""
        return sum(file.stat().st_size for file in (self.path, self.path.with_suffix(".bin"))) / MIB

    def compile(self, batch: int, **settings: object) -> openvino.CompiledModel:
        network = core.read_model(self.path)
        network.reshape([batch, 3, *SIZE])
        return core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": self.precision, **settings})


class PaperMapGenerator(AnomalyMapGenerator):
    """Computes the same map as the paper does: both terms of Eq. (6), and a blur with a two-dimensional kernel."""

    def __init__(self, *, l2_weight: float, sigma: float) -> None:
        super().__init__(l2_weight=l2_weight, sigma=sigma)
        self.blur = GaussianBlur2d(sigma)

    def sum_levels(self, first: Sequence[Tensor], second: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        maps = []
        for a, b in zip(map(F.normalize, first), map(F.normalize, second), strict=True):
            distance = (a - b).square().sum(dim=1, keepdim=True) / 2
            maps.append(self.l2_weight * distance + 1 - F.cosine_similarity(a, b).unsqueeze(1))
        return sum_of_levels(maps, size)


def train_on_one_batch(model: AnomalibModule) -> AnomalibModule:
    with tempfile.TemporaryDirectory() as folder:
        engine = common.quiet_engine(folder, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
        engine.fit(model, datamodule=MagneticTile(options.root, train_batch_size=4))
    return model


def train_detector(model_class: type[DistillationModule], **arguments: object) -> AnomalibModule:
    arguments = {"teacher_weights": options.weights, "image_size": options.size, "seed": 0} | arguments
    return train_on_one_batch(model_class(**arguments, **common.NO_EVALUATION))


detector = cache(train_detector)


@cache
def peer(model_class: type[AnomalibModule]) -> AnomalibModule:
    return train_on_one_batch(common.build_peer(model_class, options.size))


def dskd_with_paper_map() -> AnomalibModule:
    """Train DSKD with the same seed again, replace its map generator, and check that the map stays the same."""
    model = train_detector(Dskd)
    l2_weight = model.model.anomaly_map_generator.l2_weight
    model.model.anomaly_map_generator = PaperMapGenerator(l2_weight=l2_weight, sigma=4.0).eval()
    images = torch.from_numpy(random_images(2))
    with torch.no_grad():
        expected = detector(Dskd).eval()(images).anomaly_map
        torch.testing.assert_close(model.eval()(images).anomaly_map, expected)
    return model


def export(
    build: Callable[[], AnomalibModule],
    folder: Path,
    compression: CompressionType | None = None,
    precision: str = "f32",
) -> Export:
    model = build()
    data = MagneticTile(options.root) if compression == INT8 else None
    path = model.to_openvino(folder, input_size=SIZE, compression_type=compression, datamodule=data)
    macs = measure_cost(model, SIZE)["macs"]
    operations = set(map_operations(core.read_model(path))) if isinstance(model, DistillationModule) else set()
    return Export(path, int(macs or 0), operations, precision)


dskd = partial(detector, Dskd)
lite = partial(detector, Dskd, teacher="tf_efficientnet_lite0", teacher_weights=None)
recommended = partial(detector, Dskd, **common.RECOMMENDED)
recommended_lite = partial(lite, **common.RECOMMENDED)
siblings = {
    "AFKD": partial(detector, Afkd),
    "DTGD": partial(detector, Dtgd),
    "TAD++": partial(detector, Tad, assistant=None),  # no export holds the assistant, which would train first
}
stfpm = partial(peer, Stfpm)
MODELS: dict[str, Callable[[Path], Export]] = {
    "DSKD": partial(export, dskd),
    "DSKD, map as in the paper": partial(export, dskd_with_paper_map),
    "DSKD, FP16 weights": partial(export, dskd, compression=CompressionType.FP16),
    "DSKD, INT8 weights": partial(export, dskd, compression=CompressionType.INT8),
    "DSKD, INT8": partial(export, dskd, compression=INT8),
    "DSKD lite": partial(export, lite),
    "DSKD lite, INT8": partial(export, lite, compression=INT8),
    "DSKD, bfloat16": partial(export, dskd, precision="bf16"),
    "DSKD, recommended": partial(export, recommended),
    "DSKD, recommended, INT8": partial(export, recommended, compression=INT8),
    "DSKD lite, recommended": partial(export, recommended_lite),
    "DSKD lite, recommended, INT8": partial(export, recommended_lite, compression=INT8),
    "STFPM, bfloat16": partial(export, stfpm, precision="bf16"),
}
for name, build in siblings.items():
    MODELS[name] = partial(export, build)
    MODELS[f"{name}, INT8"] = partial(export, build, compression=INT8)
MODELS["PaDiM"] = partial(export, partial(peer, Padim))
MODELS["STFPM"] = partial(export, stfpm)
MODELS["Reverse Distillation"] = partial(export, partial(peer, ReverseDistillation))


def random_images(batch: int) -> np.ndarray:
    return np.random.default_rng(0).random((batch, 3, *SIZE), dtype=np.float32)


def milliseconds(run: Callable[[], object], runs: int) -> list[float]:
    """Return the time of each run after one to warm up."""
    run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return times


def throughput(model: Export, batch: int) -> float:
    """Return images per second."""
    compiled = model.compile(batch, PERFORMANCE_HINT="THROUGHPUT")
    return images_per_second(compiled, random_images(batch), seconds=BATCH_SECONDS)


def peak_gflops() -> float:
    """Return the GFLOP/s of a large FP32 matrix product."""
    side = 3072
    first, second = torch.rand(2, side, side)
    return 2 * side**3 / statistics.median(milliseconds(lambda: first @ second, 10)) / 1e6


def print_latency_and_throughput(models: dict[str, Export]) -> None:
    compiled = {name: model.compile(1, PERFORMANCE_HINT="LATENCY") for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, network in compiled.items():
            times[name] += milliseconds(lambda network=network: network([random_images(1)]), options.runs)
    del compiled, network
    medians = {name: statistics.median(values) for name, values in times.items()}
    size, peak = f"{options.size}x{options.size}", peak_gflops()
    print(f"\n{size}, batch size 1, {options.rounds} rounds of {options.runs} images; peak {peak:.0f} GFLOP/s")
    common.print_header(
        "model", "ms per image", "relative to DSKD", "relative to STFPM", "MiB", "images/s (batch size)", "GFLOP/s"
    )
    for name, model in models.items():
        rate, batch = max((throughput(model, batch), batch) for batch in options.batches)
        common.print_row(
            name,
            f"{medians[name]:.1f}",
            f"{medians[name] / medians['DSKD']:.2f}",
            f"{medians[name] / medians['STFPM']:.2f}",
            f"{model.mib:.1f}",
            f"{rate:.0f} ({batch})",
            f"{2 * model.macs * rate / 1e9:.0f}",
        )


def profile(model: Export) -> dict[str, float]:
    """Return ms per image by part (networks, map) and OpenVINO's type of layer."""
    request = model.compile(1, PERFORMANCE_HINT="LATENCY", PERF_COUNT=True).create_infer_request()
    times: dict[str, float] = defaultdict(float)
    milliseconds(lambda: request.infer([random_images(1)]), options.runs)  # to warm up
    for _ in range(options.runs):
        request.infer([random_images(1)])
        for layer in request.profiling_info:
            part = "map" if layer.node_name in model.map_operations else "networks"
            times[f"{part}: {layer.node_type}"] += 1000 * layer.real_time.total_seconds() / options.runs
    return times


def print_profiles(models: dict[str, Export]) -> None:
    profiles = {name: profile(models[name]) for name in PROFILED if name in models}
    print()
    common.print_header("ms per image by type of layer", *profiles)
    for layer in sorted({layer for times in profiles.values() for layer in times}):
        if any(times[layer] > 0.01 * sum(times.values()) for times in profiles.values()):
            common.print_row(layer, *(f"{times[layer]:.2f}" for times in profiles.values()))
    for part in ("networks", "map"):
        sums = (sum(ms for layer, ms in times.items() if layer.startswith(part)) for times in profiles.values())
        common.print_row(f"{part}: total", *(f"{ms:.2f}" for ms in sums))


if unknown := set(options.only or ()) - set(MODELS):
    parser.error(f"--only: unknown {', '.join(sorted(unknown))}. Supported values: {', '.join(MODELS)}.")
with common.offline_resnet18(options.weights), tempfile.TemporaryDirectory() as folder:
    chosen = [name for name in MODELS if not options.only or name in {"DSKD", "STFPM", *options.only}]
    models = {name: MODELS[name](Path(folder, name)) for name in chosen}
    print_latency_and_throughput(models)
    print_profiles(models)
