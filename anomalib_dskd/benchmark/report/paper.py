"""Results published in tables 1 to 9 of the DSKD paper, and the models and data sets that they belong to.

Yao and Gao: "Dual-Student Knowledge Distillation Networks for Unsupervised Anomaly Detection", arXiv:2402.00448
(2024). The tables here hold the methods that anomalib implements, under their class names: ``Dskd`` ("Ours"),
``Padim``, ``Stfpm`` ("STPM") and ``Patchcore``. Values are in percent as printed; categories have anomalib's names.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = [
    "CITATION",
    "EPOCHS",
    "TABLE_6",
    "Ablation",
    "Benchmark",
    "find_ablation",
    "find_benchmark",
    "find_method",
]

CITATION = (
    "Yao and Gao: Dual-Student Knowledge Distillation Networks for Unsupervised Anomaly Detection, arXiv:2402.00448"
)
EPOCHS = 200  # section 4.1.2

Triple = tuple[float | None, float | None, float | None]
"""Image AUROC, pixel AUROC and AUPRO up to a false positive rate of 0.3, in percent."""

METRICS: Final = ("image_AUROC", "pixel_AUROC", "AUPRO")


@dataclass(frozen=True)
class Benchmark:
    """The paper's results on one data set.

    Args:
        name: of the data set, in the paper.
        tables: number of the paper's table by metric.
        image_size: height and width of the training images (section 4.1.2).
        means: results over the whole data set by method, as printed.
        categories: results by method and category; empty for data without categories.
    """

    name: str
    tables: Mapping[str, int]
    image_size: tuple[int, int]
    means: Mapping[str, Triple]
    categories: Mapping[str, Mapping[str, Triple]]

    def result(self, method: str | None, metric: str, category: str) -> float | None:
        """Return the result of one category, in percent, or None if the paper has none."""
        triple = self.categories.get(method or "", {}).get(category)
        return None if triple is None else triple[METRICS.index(metric)]

    def mean(self, method: str | None, metric: str, categories: Collection[str]) -> float | None:
        """Return the mean over exactly these categories, in percent, or None if the paper lacks one of them.

        For all categories of the paper, and for data without categories, this is the mean that the paper prints.
        """
        if set(categories) == self.all_categories or not self.all_categories:
            return self.means.get(method or "", (None, None, None))[METRICS.index(metric)]
        results = [self.result(method, metric, category) for category in categories]
        known = [result for result in results if result is not None]
        return sum(known) / len(known) if known and len(known) == len(results) else None

    @property
    def all_categories(self) -> set[str]:
        """The categories that the paper lists."""
        return set(self.categories.get("Dskd", {}))


def _by_method(
    methods: tuple[str, ...],
    image: Mapping[str, tuple[float, ...]],
    pixel: Mapping[str, tuple[tuple[float, float], ...]],
) -> dict[str, dict[str, Triple]]:
    """Convert the paper's two tables, with one row per category, to results by method and category.

    The second table may have fewer methods than the first: the last ones of ``methods``.
    """
    results: dict[str, dict[str, Triple]] = {method: {} for method in methods}
    for category, row in image.items():
        pairs: list[tuple[float | None, float | None]] = [*pixel[category]]
        pairs = [(None, None)] * (len(methods) - len(pairs)) + pairs
        for method, image_auroc, pair in zip(methods, row, pairs, strict=True):
            results[method][category] = (image_auroc, *pair)
    return results


_TABLE_1 = {  # image AUROC of PaDiM, STPM, DSKD on MVTec AD
    "carpet": (99.8, 98.9, 100.0),
    "grid": (96.7, 100.0, 100.0),
    "leather": (100.0, 100.0, 100.0),
    "tile": (98.1, 95.5, 98.4),
    "wood": (99.2, 99.2, 99.6),
    "bottle": (99.9, 100.0, 100.0),
    "cable": (92.7, 92.3, 99.2),
    "capsule": (91.3, 88.0, 93.1),
    "hazelnut": (92.0, 100.0, 100.0),
    "metal_nut": (98.7, 100.0, 99.7),
    "pill": (93.3, 93.8, 96.2),
    "screw": (85.8, 88.2, 97.1),
    "toothbrush": (96.1, 87.8, 98.9),
    "transistor": (97.4, 93.7, 97.5),
    "zipper": (90.3, 93.6, 97.4),
}
_TABLE_2 = {  # pixel AUROC and PRO of the same
    "carpet": ((99.1, 96.2), (98.8, 95.8), (99.2, 97.7)),
    "grid": ((97.3, 94.6), (99.0, 96.6), (99.4, 97.7)),
    "leather": ((99.2, 97.8), (99.3, 98.0), (99.4, 99.1)),
    "tile": ((94.1, 86.0), (97.4, 92.1), (94.5, 88.2)),
    "wood": ((94.9, 91.1), (97.2, 93.6), (94.3, 91.6)),
    "bottle": ((98.3, 94.8), (98.8, 95.1), (98.7, 96.4)),
    "cable": ((96.7, 88.8), (95.5, 87.7), (97.5, 92.5)),
    "capsule": ((98.5, 93.5), (98.3, 92.2), (98.7, 94.4)),
    "hazelnut": ((98.2, 92.6), (98.5, 94.3), (98.8, 94.6)),
    "metal_nut": ((97.2, 85.6), (97.6, 94.5), (96.7, 89.5)),
    "pill": ((95.7, 92.7), (97.8, 96.5), (97.1, 94.7)),
    "screw": ((98.5, 94.4), (98.3, 93.0), (99.4, 94.2)),
    "toothbrush": ((98.8, 93.1), (98.9, 92.2), (99.1, 94.5)),
    "transistor": ((97.5, 84.5), (82.5, 69.5), (91.5, 80.2)),
    "zipper": ((98.5, 95.9), (98.5, 95.2), (97.5, 93.5)),
}
_TABLE_3 = {  # image AUROC of PaDiM, PatchCore, STPM, DSKD on MVTec 3D-AD, RGB only
    "bagel": (97.5, 87.6, 93.0, 96.1),
    "cable_gland": (77.5, 88.0, 84.7, 93.0),
    "carrot": (69.8, 79.1, 89.0, 90.0),
    "cookie": (58.2, 68.2, 57.5, 65.4),
    "dowel": (95.9, 91.2, 94.7, 97.6),
    "foam": (66.3, 70.1, 76.6, 84.8),
    "peach": (85.8, 69.5, 71.0, 88.0),
    "potato": (53.5, 61.8, 59.8, 65.5),
    "rope": (83.2, 84.1, 96.5, 98.0),
    "tire": (76.0, 70.2, 70.1, 86.2),
}
_TABLE_4 = {  # pixel AUROC and PRO of DSKD only
    "bagel": ((99.0, 95.0),),
    "cable_gland": ((99.1, 98.8),),
    "carrot": ((99.2, 98.5),),
    "cookie": ((97.9, 89.0),),
    "dowel": ((99.3, 97.6),),
    "foam": ((95.5, 85.8),),
    "peach": ((99.1, 97.9),),
    "potato": ((99.0, 97.6),),
    "rope": ((99.1, 94.7),),
    "tire": ((99.1, 97.4),),
}

MVTEC_AD = Benchmark(
    name="MVTec AD",
    tables={"image_AUROC": 1, "pixel_AUROC": 2, "AUPRO": 2},
    image_size=(256, 256),
    means={"Padim": (95.5, 97.5, 92.1), "Stfpm": (95.4, 97.0, 92.1), "Dskd": (98.5, 97.6, 93.5)},
    categories=_by_method(("Padim", "Stfpm", "Dskd"), _TABLE_1, _TABLE_2),
)
MVTEC_3D_AD = Benchmark(
    name="MVTec 3D-AD (RGB)",
    tables={"image_AUROC": 3, "pixel_AUROC": 4, "AUPRO": 4},
    image_size=(256, 256),
    means={
        "Padim": (76.4, None, None),
        "Patchcore": (77.0, None, None),
        "Stfpm": (79.3, None, None),
        "Dskd": (86.4, 98.6, 95.2),
    },
    categories=_by_method(("Padim", "Patchcore", "Stfpm", "Dskd"), _TABLE_3, _TABLE_4),
)
MAGNETIC_TILE = Benchmark(
    name="MT Defects",
    tables={"image_AUROC": 5, "pixel_AUROC": 5, "AUPRO": 5},
    image_size=(128, 128),
    means={"Dskd": (96.2, 83.3, 70.3)},
    categories={},
)


@dataclass(frozen=True)
class Complexity:
    """A column of table 6: seconds per image on an Intel i7 at 2.3 GHz, GMAC, and million parameters.

    "Memory (MB)" (DSKD 105, PaDiM 3800) is left out: the paper does not say what was measured.
    """

    seconds: float
    gmac: float
    parameters: float


TABLE_6: Final = {"Padim": Complexity(0.890, 22.85, 68.9), "Dskd": Complexity(0.217, 6.17, 39.3)}
TABLE_6_SIZE: Final = (256, 256)  # DSKD needs 6.17 GMAC at this size


@dataclass(frozen=True)
class Ablation:
    """A row of the paper's tables 7, 8 or 9: means over all categories of MVTec AD."""

    table: int
    row: str
    results: Triple


_FULL = Ablation(7, "DS: full model", (98.5, 97.6, 93.5))  # table 9 prints 97.5 for its pixel AUROC
_TABLE_7 = {  # (map_pair, losses)
    ("T-E", "encoder"): Ablation(7, "T-E: teacher and encoder", (95.3, 96.1, 89.4)),
    ("T-D", "decoder"): Ablation(7, "T-D: teacher and decoder", (97.8, 97.1, 93.1)),
    ("E-D", "both"): Ablation(7, "E-D: encoder and decoder", (93.2, 94.6, 87.7)),
}
_TABLE_8 = Ablation(8, "without deep feature embedding", (75.6, 89.6, 76.5))
_TABLE_9 = {
    (1,): Ablation(9, "only map M1", (96.0, 95.9, 88.0)),
    (2,): Ablation(9, "only map M2", (96.5, 96.4, 91.0)),
    (3,): Ablation(9, "only map M3", (92.7, 94.2, 88.7)),
}

_SETTINGS = {
    "layers": [1, 2, 3],
    "l2_weight": 0.1,
    "sigma": 4.0,
    "context_weight": 0.0,
    "encoder": "student",
    "learning_rate": 1e-3,
    "schedule": "constant",
    "betas": [0.5, 0.999],
    "hard_mining": 0.0,
    "ema_decay": 0.0,
}
"""Arguments that the paper sets and its ablations do not change."""


def find_benchmark(data: str) -> Benchmark | None:
    """Return the paper's results on a data set with the name of anomalib's class or of the paper, else None.

    Example:
        >>> find_benchmark("MVTec3D").name, find_benchmark("my images")
        ('MVTec 3D-AD (RGB)', None)
    """
    return {
        "mvtecad": MVTEC_AD,
        "mvtec3d": MVTEC_3D_AD,
        "mvtec3dad": MVTEC_3D_AD,
        "magnetictile": MAGNETIC_TILE,
        "magnetictiledefects": MAGNETIC_TILE,
        "mtdefects": MAGNETIC_TILE,
    }.get("".join(character for character in data.lower() if character.isalnum()))


def find_method(class_path: str, init_args: Mapping[str, Any]) -> str | None:
    """Return the paper's method that a model implements, or None.

    A ``Dskd`` is the paper's method only with the paper's arguments; arguments that the paper does not specify, such
    as ``embedding_input``, may have any value. The paper gives no arguments of the other methods: theirs are ignored.
    """
    name = class_path.rpartition(".")[2]
    if name == "Dskd":
        return name if find_ablation(class_path, init_args) == _FULL else None
    return name if name in {"Padim", "Stfpm", "Patchcore"} else None


def find_ablation(class_path: str, init_args: Mapping[str, Any]) -> Ablation | None:
    """Return the row of tables 7 to 9 that a ``Dskd`` with these arguments corresponds to, or None.

    Example:
        >>> find_ablation("anomalib_dskd.Dskd", {"map_pair": "E-D", "seed": 1}).row
        'E-D: encoder and decoder'
    """
    if class_path.rpartition(".")[2] != "Dskd" or not _has_paper_settings(init_args):
        return None
    pair = (init_args.get("map_pair", "T-D"), init_args.get("losses", "both"))
    embedding = init_args.get("embedding", True)
    maps = tuple(init_args.get("map_layers") or (1, 2, 3))
    if maps == (1, 2, 3):
        if pair == ("T-D", "both"):
            return _FULL if embedding else _TABLE_8
        return _TABLE_7.get(pair) if embedding else None
    return _TABLE_9.get(maps) if pair == ("T-D", "both") and embedding else None


def _has_paper_settings(init_args: Mapping[str, Any]) -> bool:
    if str(init_args.get("teacher", "resnet18")).partition(".")[0] != "resnet18":
        return False
    given = {name: init_args.get(name, value) for name, value in _SETTINGS.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()} == _SETTINGS
