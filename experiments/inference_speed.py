"""How long one picture takes in OpenVINO, and how many a second are possible: DSKD, siblings and peers, f32 and 8 bits.

All models are measured by turns, round after round, so that a slower minute of the machine meets all of them. Weights
do not change the time, so each model is trained for one batch only. What a model computes in floating point is done in
32 bits (``INFERENCE_PRECISION_HINT``), unless its row says otherwise; processors without bfloat16 units ignore that.

    python experiments/inference_speed.py --root datasets/MagneticTile --weights resnet18.tv_in1k.safetensors
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, required=True, help="folder of the Magnetic Tile Defects data")
parser.add_argument("--weights", required=True, help="file with the weights of resnet18.tv_in1k")
parser.add_argument("--size", type=int, default=256, help="height and width")
parser.add_argument("--rounds", type=int, default=10)
parser.add_argument("--runs", type=int, default=20, help="pictures a round and model")
parser.add_argument("--only", nargs="+", help="these models alone, by their names in the table, DSKD and STFPM")
parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="batches to try for throughput")
options = parser.parse_args()

CACHE = tempfile.TemporaryDirectory(prefix="anomalib-dskd-")
os.environ.update(HF_HUB_CACHE=CACHE.name, HF_HUB_OFFLINE="1")  # before anything imports huggingface_hub
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402 - after the environment
import openvino  # noqa: E402
import torch  # noqa: E402
from anomalib.deploy import CompressionType  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from anomalib.models import Padim, ReverseDistillation, Stfpm  # noqa: E402
from anomalib.models.components import AnomalibModule, GaussianBlur2d  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from anomalib_dskd import Afkd, Dskd, Dtgd, MagneticTile, Tad  # noqa: E402
from anomalib_dskd.benchmark.hub_cache import write_hub_cache  # noqa: E402
from anomalib_dskd.benchmark.speed import measure_cost  # noqa: E402
from anomalib_dskd.benchmark.timing import images_per_second  # noqa: E402
from anomalib_dskd.components.anomaly_map import AnomalyMapGenerator, sum_of_levels  # noqa: E402
from anomalib_dskd.models.distillation.lightning_model import DistillationMixin  # noqa: E402
from anomalib_dskd.models.distillation.quantization import map_operations  # noqa: E402

OFF = {"visualizer": False, "evaluator": False}
SIZE = (options.size, options.size)
MIB = 2**20


@dataclass
class Export:
    """A model on disk.

    Attributes:
        path: of the ``.xml`` file.
        macs: multiply-adds a picture.
        in_map: names of the operations of the anomaly map, for models that have cosines.
        precision: of what is computed in floating point.
    """

    path: Path
    macs: int
    in_map: set[str]
    precision: str = "f32"

    @property
    def mib(self) -> float:
        return sum(file.stat().st_size for file in (self.path, self.path.with_suffix(".bin"))) / MIB

    def compile(self, batch: int, **settings: object) -> openvino.CompiledModel:
        network = core.read_model(self.path)
        network.reshape([batch, 3, *SIZE])
        return core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": self.precision, **settings})


class LiteralMap(AnomalyMapGenerator):
    """The same map as the paper writes it: both terms of Eq. (6), and a blur of 33 x 33 numbers a pixel."""

    def __init__(self, *, l2_weight: float, sigma: float) -> None:
        super().__init__(l2_weight=l2_weight, sigma=sigma)
        self.blur = GaussianBlur2d(sigma)

    def forward(self, first: Sequence[Tensor], second: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        maps = []
        for a, b in zip(map(F.normalize, first), map(F.normalize, second), strict=True):
            distance = (a - b).square().sum(dim=1, keepdim=True) / 2
            maps.append(self.l2_weight * distance + 1 - F.cosine_similarity(a, b).unsqueeze(1))
        return self.blur(sum_of_levels(maps, size))


def detector(model_class: type[DistillationMixin], **arguments: object) -> AnomalibModule:
    return model_class(image_size=options.size, seed=0, **OFF, **{"teacher_weights": options.weights} | arguments)


def peer(model_class: type[AnomalibModule]) -> AnomalibModule:
    return model_class(backbone="resnet18", pre_processor=model_class.configure_pre_processor(image_size=SIZE), **OFF)


def trained(model: AnomalibModule) -> AnomalibModule:
    with tempfile.TemporaryDirectory() as folder:
        Engine(
            default_root_dir=folder,
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            limit_train_batches=1,
            limit_val_batches=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(model, datamodule=MagneticTile(options.root, train_batch_size=4))
    return model


def export(name: str, model: AnomalibModule, compression: CompressionType | None = None) -> Export:
    data = MagneticTile(options.root) if compression == CompressionType.INT8_PTQ else None
    path = model.to_openvino(FOLDER / name, input_size=SIZE, compression_type=compression, datamodule=data)
    macs = measure_cost(model, SIZE, trained=0)["macs"]
    in_map = set(map_operations(core.read_model(path))) if isinstance(model, DistillationMixin) else set()
    return Export(path, int(macs or 0), in_map)


def milliseconds(run: Callable[[], object], runs: int) -> list[float]:
    run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return times


def images_a_second(model: Export, batch: int) -> float:
    return images_per_second(model.compile(batch, PERFORMANCE_HINT="THROUGHPUT"), picture(batch), seconds=3.0)


def peak_gflops() -> float:
    """Floating-point operations a second of a large matrix product, in 32 bits."""
    side = 3072
    first, second = torch.rand(2, side, side)
    return 2 * side**3 / statistics.median(milliseconds(lambda: first @ second, 10)) / 1e6


def picture(batch: int) -> np.ndarray:
    return np.random.default_rng(0).random((batch, 3, *SIZE), dtype=np.float32)


def print_latency_and_throughput() -> None:
    requests = {name: model.compile(1, PERFORMANCE_HINT="LATENCY") for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, compiled in requests.items():
            times[name] += milliseconds(lambda compiled=compiled: compiled([picture(1)]), options.runs)
    del requests
    own, stfpm = (statistics.median(times[name]) for name in ("DSKD", "STFPM"))
    peak = peak_gflops()
    print(
        f"\n{options.size}x{options.size}, batch 1, {options.rounds} rounds of {options.runs}; peak {peak:.0f} GFLOP/s"
    )
    print("| model | ms | of DSKD's f32 | of STFPM's f32 | MiB | images/s (batch) | GFLOP/s |")
    print("|---|---|---|---|---|---|---|")
    for name, model in models.items():
        median = statistics.median(times[name])
        rate, batch = max((images_a_second(model, batch), batch) for batch in options.batches)
        gflops = 2 * model.macs * rate / 1e9
        print(
            f"| {name} | {median:.1f} | {median / own:.2f} | {median / stfpm:.2f} | {model.mib:.1f} | "
            f"{rate:.0f} ({batch}) | {gflops:.0f} |"
        )


def where_time_goes(model: Export) -> dict[str, float]:
    """Milliseconds a picture by part and OpenVINO's type of layer."""
    request = model.compile(1, PERFORMANCE_HINT="LATENCY", PERF_COUNT=True).create_infer_request()
    spent: dict[str, float] = defaultdict(float)
    milliseconds(lambda: request.infer([picture(1)]), options.runs)  # to warm up
    for _ in range(options.runs):
        request.infer([picture(1)])
        for step in request.profiling_info:
            part = "map" if step.node_name in model.in_map else "networks"
            spent[f"{part}: {step.node_type}"] += 1000 * step.real_time.total_seconds() / options.runs
    return spent


def print_where_time_goes() -> None:
    columns = {name: where_time_goes(models[name]) for name in PROFILED if name in models}
    parts = sorted({part for spent in columns.values() for part in spent})
    print(f"\n| where the time goes, ms | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for part in parts:
        if any(spent[part] > 0.01 * sum(spent.values()) for spent in columns.values()):
            print(f"| {part} | {' | '.join(f'{spent[part]:.2f}' for spent in columns.values())} |")
    for whole in ("networks", "map"):
        sums = (sum(ms for part, ms in spent.items() if part.startswith(whole)) for spent in columns.values())
        print(f"| all of the {whole} | {' | '.join(f'{ms:.2f}' for ms in sums)} |")


core = openvino.Core()
write_hub_cache({"resnet18": options.weights}, Path(CACHE.name))
FOLDER = Path(CACHE.name) / "exports"
INT8 = CompressionType.INT8_PTQ
PROFILED = ("DSKD, map as in the paper", "DSKD", "DSKD, INT8")


@cache
def dskd() -> AnomalibModule:
    return trained(detector(Dskd))


@cache
def lite() -> AnomalibModule:
    return trained(detector(Dskd, teacher="tf_efficientnet_lite0", teacher_weights=None))


@cache
def sibling(model_class: type[DistillationMixin]) -> AnomalibModule:
    # TAD++'s assistant is in no export, and has the only epoch if there is one
    return trained(detector(model_class, **({"assistant": None} if model_class is Tad else {})))


def with_literal_map() -> AnomalibModule:
    model = trained(detector(Dskd))  # with the same seed
    kept = model.model.anomaly_map_generator
    model.model.anomaly_map_generator = LiteralMap(l2_weight=kept.l2_weight, sigma=4.0).eval()
    images = torch.from_numpy(picture(2))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).anomaly_map, dskd().eval()(images).anomaly_map)
    return model


@cache
def built(name: str) -> Export:
    return MODELS[name]()


MODELS: dict[str, Callable[[], Export]] = {
    "DSKD": lambda: export("dskd", dskd()),
    "DSKD, map as in the paper": lambda: export("literal", with_literal_map()),
    "DSKD, FP16 weights": lambda: export("fp16", dskd(), CompressionType.FP16),
    "DSKD, INT8 weights": lambda: export("int8", dskd(), CompressionType.INT8),
    "DSKD, INT8": lambda: export("int8_ptq", dskd(), INT8),
    "DSKD lite": lambda: export("lite", lite()),
    "DSKD lite, INT8": lambda: export("lite_int8_ptq", lite(), INT8),
    "DSKD, bfloat16": lambda: replace(built("DSKD"), precision="bf16"),
    "STFPM, bfloat16": lambda: replace(built("STFPM"), precision="bf16"),
}
for name, model_class in (("AFKD", Afkd), ("DTGD", Dtgd), ("TAD++", Tad)):
    MODELS[name] = lambda name=name, model_class=model_class: export(name, sibling(model_class))
    MODELS[f"{name}, INT8"] = lambda name=name, model_class=model_class: export(
        f"{name} int8_ptq", sibling(model_class), INT8
    )
for name, model_class in (("PaDiM", Padim), ("STFPM", Stfpm), ("Reverse Distillation", ReverseDistillation)):
    MODELS[name] = lambda name=name, model_class=model_class: export(name, trained(peer(model_class)))
if unknown := set(options.only or ()) - set(MODELS):
    parser.error(f"--only: {', '.join(sorted(unknown))}. Legal are {', '.join(MODELS)}.")
models = {name: built(name) for name in MODELS if not options.only or name in {"DSKD", "STFPM", *options.only}}
print_latency_and_throughput()
print_where_time_goes()
