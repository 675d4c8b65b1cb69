"""How long one picture takes in OpenVINO, and how many a second are possible: DSKD, siblings and peers, f32 and 8 bits.

All models are measured by turns, round after round, so that a slower minute of the machine meets all of them. Weights
do not change the time, so each model is trained for one batch only. What a model computes in floating point is done in
32 bits (``INFERENCE_PRECISION_HINT``), unless its row says otherwise; processors without bfloat16 units ignore that.

    python benchmarks/inference_speed.py --root datasets/MagneticTile --weights resnet18.tv_in1k.safetensors
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, required=True, help="folder of the Magnetic Tile Defects data")
parser.add_argument("--weights", required=True, help="file with the weights of resnet18.tv_in1k")
parser.add_argument("--size", type=int, default=256, help="height and width")
parser.add_argument("--rounds", type=int, default=10)
parser.add_argument("--runs", type=int, default=20, help="pictures a round and model")
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
from anomalib.models.components import AnomalibModule  # noqa: E402

from anomalib_dskd import Afkd, Dskd, Dtgd, MagneticTile, Tad  # noqa: E402
from anomalib_dskd.benchmark.hub_cache import write_hub_cache  # noqa: E402
from anomalib_dskd.benchmark.speed import measure_cost  # noqa: E402
from anomalib_dskd.benchmark.timing import images_per_second  # noqa: E402
from anomalib_dskd.models.distillation.lightning_model import DistillationMixin  # noqa: E402
from anomalib_dskd.quantization import map_operations  # noqa: E402

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


def print_where_time_goes(name: str) -> None:
    model = models[name]
    request = model.compile(1, PERFORMANCE_HINT="LATENCY", PERF_COUNT=True).create_infer_request()
    spent: dict[str, float] = defaultdict(float)
    milliseconds(lambda: request.infer([picture(1)]), options.runs)  # to warm up
    for _ in range(options.runs):
        request.infer([picture(1)])
        for step in request.profiling_info:
            part = "map" if step.node_name in model.in_map else "networks"
            spent[f"{part}: {step.node_type}"] += 1000 * step.real_time.total_seconds() / options.runs
    total = sum(spent.values())
    print(f"\nWhere the time of {name!r} goes ({total:.1f} ms)\n| part | ms | share |\n|---|---|---|")
    for part, time_spent in sorted(spent.items(), key=lambda item: -item[1]):
        if time_spent > total / 100:
            print(f"| {part} | {time_spent:.2f} | {time_spent / total:.0%} |")


core = openvino.Core()
write_hub_cache({"resnet18": options.weights}, Path(CACHE.name))
FOLDER = Path(CACHE.name) / "exports"
whole = trained(detector(Dskd))
lite = trained(detector(Dskd, teacher="tf_efficientnet_lite0", teacher_weights=None))
models = {
    "DSKD": export("dskd", whole),
    "DSKD, FP16 weights": export("fp16", whole, CompressionType.FP16),
    "DSKD, INT8 weights": export("int8", whole, CompressionType.INT8),
    "DSKD, INT8": export("int8_ptq", whole, CompressionType.INT8_PTQ),
    "DSKD lite": export("lite", lite),
    "DSKD lite, INT8": export("lite_int8_ptq", lite, CompressionType.INT8_PTQ),
}
siblings = {
    "AFKD": detector(Afkd),
    "DTGD": detector(Dtgd),
    "TAD++": detector(Tad, assistant=None),  # it is in no export, and has the only epoch if there is one
}
for name, model in siblings.items():
    models[name] = export(name, trained(model))
    models[f"{name}, INT8"] = export(f"{name} int8_ptq", model, CompressionType.INT8_PTQ)
for name, model_class in (("PaDiM", Padim), ("STFPM", Stfpm), ("Reverse Distillation", ReverseDistillation)):
    models[name] = export(name, trained(peer(model_class)))
models["DSKD, bfloat16"] = replace(models["DSKD"], precision="bf16")
models["STFPM, bfloat16"] = replace(models["STFPM"], precision="bf16")
print_latency_and_throughput()
for profiled in ("DSKD", "DSKD, INT8"):
    print_where_time_goes(profiled)
