import base64
import csv
import hashlib
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from anomalib_dskd.benchmark.job_result import JobResult
from anomalib_dskd.benchmark.report import paper
from anomalib_dskd.benchmark.report.gallery import OUTLINE, SIDE, make_gallery, share_below
from anomalib_dskd.benchmark.report.scatter import Point, draw_accuracy_against_latency
from anomalib_dskd.benchmark.report.tables import AUPRO, IMAGE_AUROC, summarize
from anomalib_dskd.benchmark.report.write_report import write_report
from anomalib_dskd.errors import ArgumentError, DataError

HOSTILE = '<b>&"x'
NO_RESULT = "\N{EN DASH}"  # the paper has none
CLASS_PATHS = {"DSKD": "anomalib_dskd.Dskd", "PaDiM": "anomalib.models.Padim", "STFPM": "anomalib.models.Stfpm"}


# --- small run folders ------------------------------------------------------------------------------------------


def failed(model="DSKD", data="MagneticTile", category=None, seed=0, *, reason="out of memory", **changes) -> dict:
    """The settings of a job, and the reason why it failed."""
    job = hashlib.sha256(repr((model, data, category, seed)).encode()).hexdigest()[:12]
    return {
        "job": job,
        "status": "failed",
        "reason": reason,
        "model": model,
        "class_path": CLASS_PATHS.get(
            model, "anomalib_dskd.Dskd" if str(model).startswith("DSKD") else "parts.Detector"
        ),
        "init_args": {},
        "data": data,
        "category": category,
        "seed": seed,
        "epochs": 30,
        "epochs_source": "this configuration",
        "image_size": [128, 128],
        "precision": "bf16-mixed",
        "accelerator": "cpu",
        **changes,
    }


def done(
    model="DSKD", data="MagneticTile", category=None, seed=0, *, image=0.9, pixel=0.8, aupro=0.7, **changes
) -> dict:
    return {
        **failed(model, data, category, seed, reason=None),
        "status": "done",
        "metrics": {"image_AUROC": image, "image_F1": 0.85, "pixel_AUROC": pixel, "AUPRO": aupro}
        | {"image_F1_at_threshold": 0.75},
        "classes": {},
        "training": {"fit_seconds": 100.0, "epochs": 30, "images": 762, "images_per_second": 40.0},
        "speed": {
            "pytorch_ms": 20.0,
            "openvino_ms": 10.0,
            "openvino_int8_ms": None,
            "throughput": 200.0,
            "throughput_batch": 4,
        },
        "cost": {
            "peak_memory_mib": 1000.0,
            "parameters": 20_948_736,
            "trained_parameters": 18_165_824,
            "macs": 1_540_000_000,
            "export_mib": 80.0,
            "int8_F1_at_threshold": 0.75,
        },
        "weights": [{"name": "resnet18", "file": "resnet18.safetensors", "sha256": "ab" * 32}],
        "machine": {"cpu": "A processor", "cores": 2, "python": "3.11.7", "anomalib": "2.7.0", "commit": "e090c33"},
        "started": "2026-11-22T04:31:00+00:00",
        "finished": "2026-11-22T05:02:00+00:00",
        **changes,
    }


def parsed(*records: dict) -> list[JobResult]:
    return [JobResult.from_json(json.dumps(record)) for record in records]


def write_run(folder, *records, tail=""):
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    (folder / "config.yaml").write_text("seeds: [0, 1]\n")
    return folder


def write_predictions(folder, record, images, *, maps=True, masks=True, size=(8, 8)):
    """Images as ``(path, label, kind, score)``; maps and masks of defects are 1 in the upper left quarter."""
    paths, labels, kinds, scores = zip(*images, strict=True)
    hot = np.zeros(size)
    hot[: size[0] // 2, : size[1] // 2] = 1
    labels = np.array(labels)
    arrays = {"paths": np.array(paths, dtype=str), "labels": labels, "classes": np.array(kinds, dtype=str)}
    arrays["scores"] = np.array(scores, dtype=np.float32)
    if maps:
        arrays["maps"] = (labels[:, None, None] * hot + 0.1).astype(np.float16)
    if masks:
        arrays["masks"] = (labels[:, None, None] * hot).astype(np.uint8)
    job = folder / "jobs" / record["job"]
    job.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(job / "predictions.npz", **arrays)


def small_run(folder):
    """Two seeds and data sets, categories, kinds of defect, failures, hostile names, and images, some missing."""
    photographs = []
    for index, kind in enumerate(["good", "good", "Crack", "Crack", HOSTILE, "Crack"]):
        path = folder / f"image_{index}.png"
        folder.mkdir(exist_ok=True)
        if index != 3:
            Image.fromarray(np.full((20, 40), 40 * index, dtype=np.uint8)).save(path)
        photographs.append((str(path), int(kind != "good"), kind, index + 0.5))
    kinds = {"Crack": {"images": 3, "image_AUROC": 0.75, "pixel_AUROC": 0.6, "AUPRO": 0.5}}
    kinds |= {HOSTILE: {"images": 1, "image_AUROC": 1.0, "pixel_AUROC": 0.7, "AUPRO": 0.4}}
    records = [
        done("DSKD", seed=0, image=0.90, classes=kinds),
        done("DSKD", seed=1, image=0.94, classes=kinds),
        done(
            "PaDiM", image=0.98, speed={"pytorch_ms": 12.0}, training={"fit_seconds": 100.04}, notes=["OpenVINO: <op>"]
        ),
        done(HOSTILE, image=0.7, speed={"pytorch_ms": 200.0, "openvino_ms": 110.0}, training={"fit_seconds": 99.96}),
        failed("STFPM", reason="RuntimeError: <script>alert(1)</script>"),
        done("DSKD", "MVTecAD", "bottle", image=0.95),
        done("DSKD", "MVTecAD", "cable", image=0.85),
        done("PaDiM", "MVTecAD", "bottle", image=0.91),
        failed("PaDiM", "MVTecAD", "cable"),
    ]
    write_run(folder, *records, tail='{"job": "cut o')
    for record in records[:2]:
        write_predictions(folder, record, photographs)
    write_predictions(folder, records[2], [(*image[:3], 9 - image[3]) for image in photographs])
    return folder


def read_tables(text: str) -> dict[str, list[list[str]]]:
    """Tables of a Markdown file by ``section / title``; the first row is the headings."""
    tables, section, title = {}, "", ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("### "):
            title = f"{section} / {line[4:]}"
        elif line.startswith("|") and not re.fullmatch(r"[|:-]+", line):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            tables.setdefault(title, []).append([cell.strip() for cell in cells])
    return tables


def report(folder, *records, **arguments) -> dict[str, list[list[str]]]:
    write_report(write_run(folder, *records), **arguments)
    return read_tables((folder / "report.md").read_text())


def column(table, name) -> dict[str, str]:
    """One column by the names of its rows; the first of that heading."""
    return {row[0]: row[table[0].index(name)] for row in table[1:]}


# --- means, standard deviations and the best ---------------------------------------------------------------------


def test_mean_is_over_seeds_then_categories_and_std_over_the_means_of_seeds():
    records = [
        done(category="a", seed=0, image=0.8),
        done(category="b", seed=0, image=0.6),
        done(category="a", seed=1, image=0.9),
        done(category="b", seed=1, image=0.9),
    ]
    summary = summarize(parsed(*records), IMAGE_AUROC)
    assert summary.mean == pytest.approx((0.85 + 0.75) / 2)
    assert summary.std == pytest.approx(math.sqrt(((0.7 - 0.8) ** 2 + (0.9 - 0.8) ** 2) / (2 - 1)))
    assert summary.category_std == pytest.approx(math.sqrt(((0.85 - 0.8) ** 2 + (0.75 - 0.8) ** 2) / (2 - 1)))
    assert summary.categories == {"a", "b"}


def test_a_seed_without_all_categories_counts_in_the_mean_and_not_in_the_std():
    records = [done(category="a", seed=seed, image=image) for seed, image in enumerate((0.8, 0.9, 1.0))]
    records += [done(category="b", seed=0, image=0.5), done(category="b", seed=1, image=0.7), failed("DSKD", seed=2)]
    summary = summarize(parsed(*records), IMAGE_AUROC)
    assert summary.mean == pytest.approx((0.9 + 0.6) / 2)
    assert summary.std == pytest.approx(np.std([0.65, 0.8], ddof=1))
    assert summarize(parsed(*records[:1], *records[3:4]), IMAGE_AUROC).std is None


def test_what_was_not_measured_has_no_mean():
    assert summarize(parsed(done(aupro=None), done(seed=1, aupro=float("nan"))), AUPRO).mean is None
    assert not summarize(parsed(done(aupro=None)), AUPRO).is_failed
    assert summarize(parsed(failed()), AUPRO).is_failed
    assert not summarize([], AUPRO).is_failed


def test_categories_by_model_with_std_mean_and_the_best_in_bold(tmp_path):
    tables = report(
        tmp_path,
        done("A", "parts", "a", 0, image=0.8),
        done("A", "parts", "b", 0, image=0.6),
        done("A", "parts", "a", 1, image=0.9),
        done("A", "parts", "b", 1, image=0.9),
        done("B", "parts", "a", 0, image=0.8504),
        done("B", "parts", "b", 0, image=0.74),
    )
    assert tables["parts / Image AUROC by category, %"] == [
        ["category", "A", "B"],
        ["a", "**85.0** ± 7.1", "**85.0**"],  # a tie at the precision shown
        ["b", "**75.0** ± 21.2", "74.0"],
        ["mean", "**80.0** ± 14.1", "79.5"],
        ["std", "7.1", "7.8"],
    ]
    assert column(tables["parts / Accuracy, means over 2 categories, %"], "image AUROC") == {
        "A": "**80.0** ± 14.1",
        "B": "79.5",
    }
    text = (tmp_path / "report.md").read_text()
    assert (
        "Mean ± standard deviation (n - 1) over 2 seeds (B 1); a result without ± has fewer than two complete seeds."
        in text
    )


def test_a_mean_over_fewer_categories_says_so_and_is_not_the_best(tmp_path):
    tables = report(
        tmp_path,
        done("A", "parts", "a", image=0.99),
        failed("A", "parts", "b"),
        done("B", "parts", "a", image=0.7),
        done("B", "parts", "b", image=0.6),
        done("C", "parts", "a", image=0.6),
        done("C", "parts", "b", image=0.6),
        done("D", "parts", "b", image=0.1),
    )
    table = tables["parts / Image AUROC by category, %"]
    assert table[1:] == [
        ["a", "**99.0**", "70.0", "60.0", "n/a"],
        ["b", "failed", "**60.0**", "**60.0**", "10.0"],
        ["mean", "99.0 (1 of 2)", "**65.0**", "60.0", "10.0 (1 of 2)"],
        ["std", "n/a", "7.1", "0.0", "n/a"],
    ]


def test_a_single_model_is_not_the_best(tmp_path):
    tables = report(tmp_path, done(image=0.9))
    assert column(tables["MagneticTile / Accuracy, %"], "image AUROC") == {"DSKD": "90.0"}
    assert "One seed: the standard deviation is unknown." in (tmp_path / "report.md").read_text()


def test_costs_are_best_small_and_rates_large(tmp_path):
    slow = {"speed": {"pytorch_ms": 30.0, "openvino_ms": None, "throughput": 50.0, "throughput_batch": 1}}
    small = {
        "cost": {"peak_memory_mib": 900.0, "parameters": 1_000_000, "macs": 2_000_000_000, "trained_parameters": 0}
    }
    tables = report(tmp_path, done("A", "parts"), done("B", "parts", **slow, **small), failed("C", "parts"))
    table = tables["parts / Cost"]
    shown = {name: tuple(column(table, name).values()) for name in table[0][1:]}
    assert shown == {
        "PyTorch, ms": ("**20.0**", "30.0", "failed"),
        "OpenVINO, ms": ("10.0", "n/a", "failed"),
        "OpenVINO INT8, ms": ("n/a", "n/a", "failed"),
        "INT8 image F1 at threshold, %": ("75.0", "n/a", "failed"),
        "throughput, images/s": ("**200.0**", "50.0", "failed"),
        "GMAC": ("**1.54**", "2.00", "failed"),
        "parameters, M": ("20.95", "**1.00**", "failed"),
        "trained, M": ("18.17", "**0.00**", "failed"),
        "peak memory, MiB": ("1000", "**900**", "failed"),
        "export, MiB": ("80.0", "n/a", "failed"),
        "fit, s": ("**100.0**", "**100.0**", "failed"),
        "training, images/s": ("**40.0**", "**40.0**", "failed"),
    }
    assert "Batch size of the throughput: A 4, B 1." in (tmp_path / "report.md").read_text()


def test_times_have_a_std_and_counts_have_none(tmp_path):
    later = done("A", "parts", seed=1, training={"fit_seconds": 110.0})
    table = report(tmp_path, done("A", "parts"), later)["parts / Cost"]
    assert column(table, "fit, s")["A"] == "105.0 ± 7.1"
    assert column(table, "parameters, M")["A"] == "20.95"


def test_data_without_masks_has_no_pixel_tables(tmp_path):
    kinds = {"dent": {"images": 4, "image_AUROC": 0.5, "pixel_AUROC": None, "AUPRO": None}}
    tables = report(tmp_path, done("A", "parts", "a", pixel=None, aupro=None, classes=kinds))
    assert [title for title in tables if title.startswith("parts")] == [
        "parts / Accuracy, %",
        "parts / Image AUROC by category, %",
        "parts / Image F1 by category, %",
        "parts / Image F1 at threshold by category, %",
        "parts / Image AUROC by kind of defect, %",
        "parts / Cost",
    ]
    assert column(tables["parts / Accuracy, %"], "AUPRO") == {"A": "n/a"}


def test_kinds_of_defect_by_model(tmp_path):
    kinds = {"Crack": {"images": 57, "image_AUROC": 0.75}, "Fray": {"images": 32, "image_AUROC": 0.5, "AUPRO": 0.25}}
    tables = report(tmp_path, done(classes=kinds), done("PaDiM", classes={"Crack": {"images": 57, "image_AUROC": 0.8}}))
    assert tables["MagneticTile / Image AUROC by kind of defect, %"] == [
        ["kind", "images", "DSKD", "PaDiM"],
        ["Crack", "57", "75.0", "**80.0**"],
        ["Fray", "32", "50.0", "n/a"],
    ]
    assert "MagneticTile / Pixel AUROC by kind of defect, %" not in tables
    assert tables["MagneticTile / AUPRO by kind of defect, %"][2] == ["Fray", "32", "25.0", "n/a"]


# --- the paper's results -----------------------------------------------------------------------------------------


def test_the_papers_results_are_next_to_ours_and_not_compared(tmp_path):
    tables = report(tmp_path, done(image=0.9), done("PaDiM", image=0.88))
    table = tables["MagneticTile / Accuracy, %"]
    f1 = ["image F1", "image F1 at threshold"]
    assert table[0] == ["model", "image AUROC", "paper", *f1, "pixel AUROC", "paper", "AUPRO", "paper"]
    assert table[1] == ["DSKD", "**90.0**", "96.2", "**85.0**", "**75.0**", "**80.0**", "83.3", "**70.0**", "70.3"]
    assert table[2][:3] == ["PaDiM", "88.0", NO_RESULT]
    assert (
        "Paper: Table 5, MT Defects. The paper trained DSKD for 200 epochs on images of 128 x 128, this benchmark for "
        "30 epochs on 128 x 128." in (tmp_path / "report.md").read_text()
    )


def test_paper_by_category_and_its_mean_over_the_same_categories(tmp_path):
    tables = report(
        tmp_path,
        *(done(model, "MVTecAD", category) for model in ("DSKD", "PaDiM", "Mine") for category in ("bottle", "cable")),
    )
    assert tables["MVTecAD / Image AUROC by category, %"] == [
        ["category", "DSKD", "DSKD, paper", "PaDiM", "PaDiM, paper", "Mine"],
        ["bottle", "**90.0**", "100.0", "**90.0**", "99.9", "**90.0**"],
        ["cable", "**90.0**", "99.2", "**90.0**", "92.7", "**90.0**"],
        ["mean", "**90.0**", "99.6", "**90.0**", "96.3", "**90.0**"],
        ["std", "0.0", NO_RESULT, "0.0", NO_RESULT, "0.0"],
    ]
    assert column(tables["MVTecAD / AUPRO by category, %"], "PaDiM, paper") == {
        "bottle": "94.8",
        "cable": "88.8",
        "mean": "91.8",
        "std": NO_RESULT,
    }
    assert tables["MVTecAD / Image F1 by category, %"][0] == ["category", "DSKD", "PaDiM", "Mine"]  # not in the paper
    assert "means are over the categories of this benchmark" in (tmp_path / "report.md").read_text()


def test_paper_mean_over_all_categories_is_the_printed_one():
    everything = paper.MVTEC_AD.all_categories
    assert len(everything) == 15
    assert [paper.MVTEC_AD.mean("Dskd", metric, everything) for metric in paper.METRICS] == [98.5, 97.6, 93.5]
    assert [paper.MAGNETIC_TILE.mean("Dskd", metric, []) for metric in paper.METRICS] == [96.2, 83.3, 70.3]
    assert paper.MVTEC_3D_AD.mean("Patchcore", "image_AUROC", paper.MVTEC_3D_AD.all_categories) == 77.0
    assert paper.MVTEC_3D_AD.mean("Patchcore", "AUPRO", ["rope"]) is None
    assert paper.MVTEC_AD.mean("Dskd", "AUPRO", ["bottle", "hat"]) is None
    assert paper.MVTEC_AD.mean(None, "AUPRO", everything) is None


@pytest.mark.parametrize("benchmark", [paper.MVTEC_AD, paper.MVTEC_3D_AD], ids=lambda benchmark: benchmark.name)
def test_paper_means_agree_with_its_categories(benchmark):
    for method, means in benchmark.means.items():
        for metric, printed in zip(paper.METRICS, means, strict=True):
            results = [benchmark.result(method, metric, category) for category in benchmark.all_categories]
            if printed is None:
                assert results == [None] * len(results)
            else:  # the paper's own means are off by up to 0.32 (PRO of STPM)
                assert np.mean(results) == pytest.approx(printed, abs=0.33)


@pytest.mark.parametrize(
    ("init_args", "row"),
    [
        ({}, (7, "DS: full model")),
        ({"seed": 3, "embedding_input": "normalized", "teacher": "resnet18.tv_in1k"}, (7, "DS: full model")),
        ({"map_layers": [1, 2, 3], "betas": (0.5, 0.999)}, (7, "DS: full model")),
        ({"map_pair": "T-E", "losses": "encoder"}, (7, "T-E: teacher and encoder")),
        ({"losses": "decoder"}, (7, "T-D: teacher and decoder")),
        ({"map_pair": "E-D"}, (7, "E-D: encoder and decoder")),
        ({"embedding": False}, (8, "without deep feature embedding")),
        ({"map_layers": [1]}, (9, "only map M1")),
        ({"map_layers": [2]}, (9, "only map M2")),
        ({"map_layers": [3]}, (9, "only map M3")),
        ({"map_layers": [1, 2]}, None),
        ({"map_layers": [3], "embedding": False}, None),
        ({"map_pair": "T-E", "losses": "both"}, None),
        ({"teacher": "tf_efficientnet_lite0"}, None),
        ({"teacher": "resnet18d"}, None),
        ({"sigma": 2.0}, None),
        ({"schedule": "one_cycle"}, None),
        ({"hard_mining": 0.7}, None),
        ({"ema_decay": 0.99}, None),
        ({"l2_weight": 0.0, "map_pair": "E-D"}, None),
    ],
)
def test_ablations_of_the_paper_are_identified_by_arguments(init_args, row):
    ablation = paper.find_ablation("anomalib_dskd.Dskd", init_args)
    assert (ablation and (ablation.table, ablation.row)) == row
    is_full = row == (7, "DS: full model")
    assert paper.find_method("anomalib_dskd.Dskd", init_args) == ("Dskd" if is_full else None)
    assert paper.find_ablation("anomalib.models.Padim", init_args) is None


def test_other_methods_of_the_paper_are_identified_by_class():
    for name in ("Padim", "Stfpm", "Patchcore"):
        assert paper.find_method(f"anomalib.models.{name}", {"backbone": "resnet50"}) == name
    assert paper.find_method("anomalib.models.EfficientAd", {}) is None


@pytest.mark.parametrize("data", ["MVTecAD", "MVTec3D", "MagneticTile"])
def test_data_sets_are_known_by_anomalibs_names(data):
    assert paper.find_benchmark(data)
    assert paper.find_benchmark(data + "2") is None


def test_the_report_of_an_unfinished_run_lists_missing_jobs(tmp_path):
    write_run(tmp_path, done(), failed("PaDiM"))
    jobs = [done(), failed("PaDiM"), *(failed("STFPM", seed=seed) for seed in (0, 1))]
    (tmp_path / "plan.json").write_text(json.dumps(jobs))
    write_report(tmp_path)
    for name in ("report.md", "report.html"):
        text = " ".join(re.sub("<[^>]*>", " ", (tmp_path / name).read_text()).split())
        assert re.search("jobs:? 1 done, 1 failed, 2 to do", text), name
        assert re.search(r"to do:? STFPM \(2\)", text), name
    (tmp_path / "plan.json").write_text(json.dumps(jobs[:2]))
    write_report(tmp_path)
    assert "to do" not in (tmp_path / "report.md").read_text()


def test_gpus_are_named_where_jobs_ran_on_one(tmp_path):
    machines = [{"cpu": "C", "cores": 2, **gpu} for gpu in ({}, {"gpu": "G"}, {"gpu": "H"})]
    write_run(tmp_path, *(done(seed=seed, machine=machine) for seed, machine in enumerate(machines)))
    write_report(tmp_path)
    assert "\n- GPU: G; H\n" in (tmp_path / "report.md").read_text()
    write_run(tmp_path, done(machine=machines[0]))
    write_report(tmp_path)
    assert "GPU" not in (tmp_path / "report.md").read_text().partition("##")[0]


def test_rows_are_in_the_order_of_the_jobs_not_of_their_ends(tmp_path):
    write_run(tmp_path, done("PaDiM"), done(), done("STFPM"))
    (tmp_path / "plan.json").write_text(json.dumps([done(), done("STFPM"), done("PaDiM")]))
    write_report(tmp_path)
    assert "- models: DSKD, STFPM, PaDiM\n" in (tmp_path / "report.md").read_text()


def test_ablations_on_other_data_have_a_table_of_their_own(tmp_path):
    tables = report(
        tmp_path, done(), done("DSKD T-E", init_args={"map_pair": "T-E", "losses": "encoder"}), done("PaDiM")
    )
    assert tables["Ablations / The paper's ablations on MVTec AD, %"][1:] == [
        ["DSKD", "Table 7, DS: full model", "98.5", "97.6", "93.5"],
        ["DSKD T-E", "Table 7, T-E: teacher and encoder", "95.3", "96.1", "89.4"],
    ]
    assert column(tables["MagneticTile / Accuracy, %"], "paper") == {
        "DSKD": "96.2",
        "DSKD T-E": NO_RESULT,
        "PaDiM": NO_RESULT,
    }


def test_ablations_on_all_of_mvtec_ad_are_next_to_our_results(tmp_path):
    ablated = {"init_args": {"embedding": False}}
    categories = sorted(paper.MVTEC_AD.all_categories)
    records = [done("DSKD", "MVTecAD", category) for category in categories]
    records += [done("DSKD plain", "MVTecAD", category, **ablated) for category in categories]
    tables = report(tmp_path, *records)
    assert column(tables["MVTecAD / Accuracy, means over 15 categories, %"], "paper") == {
        "DSKD": "98.5",
        "DSKD plain": "75.6",
    }
    assert not any(title.startswith("Ablations") for title in tables)
    tables = report(tmp_path, *records[:-1])  # a mean over 14 is not the paper's
    assert column(tables["MVTecAD / Accuracy, means over 15 categories, %"], "paper")["DSKD plain"] == NO_RESULT
    assert len(tables["Ablations / The paper's ablations on MVTec AD, %"]) == 3


def test_the_full_model_is_not_an_ablation(tmp_path):
    assert not any(title.startswith("Ablations") for title in report(tmp_path, done(), done("PaDiM")))


def test_papers_complexity_compares_at_its_own_size(tmp_path):
    at_128 = report(tmp_path, done(), done("STFPM"))["MagneticTile / Cost"]
    assert [row[0] for row in at_128[1:]] == ["DSKD", "STFPM", "DSKD, paper"]
    assert (column(at_128, "GMAC")["DSKD, paper"], column(at_128, "parameters, M")["DSKD, paper"]) == (
        NO_RESULT,
        "39.3",
    )
    at_256 = report(tmp_path, done("PaDiM", image_size=[256, 256]))["MagneticTile / Cost"]
    shown = {name: column(at_256, name)["PaDiM, paper"] for name in ("PyTorch, ms", "GMAC", "parameters, M", "fit, s")}
    assert shown == {"PyTorch, ms": "890.0", "GMAC": "22.85", "parameters, M": "68.9", "fit, s": NO_RESULT}


# --- models and settings -----------------------------------------------------------------------------------------


def test_settings_weights_machines_failures_and_notes_are_listed(tmp_path):
    one_pass = {"epochs": None, "epochs_source": "one pass of it", "notes": ["OpenVINO: no such op"]}
    other_machine = {"machine": {"cpu": "Another", "cores": 8, "commit": None}, "weights": []}
    tables = report(
        tmp_path,
        done(init_args={"sigma": 2.0}),
        failed(seed=1, init_args={"sigma": 2.0}, reason="killed | by\nthe system"),
        done("PaDiM", **one_pass, **other_machine),
    )
    prefix, common = "Models and settings / ", ("128 x 128", "bf16-mixed", "cpu")
    assert tables[prefix + "Settings"][1:] == [
        [
            "MagneticTile",
            "DSKD",
            "anomalib_dskd.Dskd",
            "sigma=2.0",
            "30",
            "this configuration",
            *common,
            "0, 1",
            "1 of 2",
        ],
        [
            "MagneticTile",
            "PaDiM",
            "anomalib.models.Padim",
            "defaults",
            "one pass",
            "one pass of it",
            *common,
            "0",
            "1 of 1",
        ],
    ]
    assert tables[prefix + "Pretrained weights"][1:] == [["resnet18", "resnet18.safetensors", "ab" * 32, "1"]]
    machines = tables[prefix + "Machines and versions"]
    assert machines[0] == ["machine", "1 (1 jobs)", "2 (1 jobs)"]
    assert ["cpu", "A processor", "Another"] in machines
    assert ["commit", "e090c33", "n/a"] in machines
    assert tables[prefix + "Notes"][1:] == [["PaDiM", "MagneticTile", "OpenVINO: no such op", "1"]]
    assert tables["Failures / Failed jobs"][1:] == [["DSKD", "MagneticTile", "", "1", "killed \\| by the system"]]
    text = (tmp_path / "report.md").read_text()
    assert "- jobs: 2 done, 1 failed\n" in text
    assert "- run: 2026-11-22 04:31 to 2026-11-22 05:02 UTC\n" in text
    assert "Measured on different processors" in text


def test_a_run_with_only_failures_has_a_report(tmp_path):
    tables = report(tmp_path, failed(), failed("PaDiM"))
    assert column(tables["MagneticTile / Accuracy, %"], "image AUROC") == {"DSKD": "failed", "PaDiM": "failed"}
    assert "No job is done." in (tmp_path / "report.md").read_text()


def test_csv_has_one_line_per_job_in_fractions_that_are_not_rounded(tmp_path):
    kinds = {"Crack": {"images": 57, "image_AUROC": 0.75, "image_F1": None, "pixel_AUROC": 0.5, "AUPRO": None}}
    kinds["Crack"]["image_F1_at_threshold"] = 0.25
    first, second = done(image=0.123456789, aupro=None, classes=kinds), failed("PaDiM", reason='a "b",\nc')
    write_report(write_run(tmp_path, first, second))
    text = (tmp_path / "results.csv").read_text()
    first, second = csv.DictReader(io.StringIO(text))
    assert (first["status"], first["image_AUROC_fraction"], first["AUPRO_fraction"]) == ("done", "0.123456789", "")
    assert (first["macs"], first["commit"], first["openvino_ms"]) == ("1540000000", "e090c33", "10.0")
    assert json.loads(first["classes"]) == kinds
    assert json.loads(first["weights"])[0]["sha256"] == "ab" * 32
    assert (second["status"], second["reason"], second["macs"]) == ("failed", 'a "b",\nc', "")
    header = text.splitlines()[0].split(",")
    assert header[:9] == ["job", "status", "reason", "model", "class_path", "init_args", "data", "category", "seed"]
    assert len(set(header)) == len(header)


def test_a_later_attempt_replaces_the_earlier_and_a_cut_off_line_is_left_out(tmp_path):
    write_run(tmp_path, failed(), done("PaDiM", image=0.5), done(image=0.9), tail=json.dumps(done(image=0.1))[:-9])
    write_report(tmp_path)
    table = read_tables((tmp_path / "report.md").read_text())["MagneticTile / Accuracy, %"]
    assert column(table, "image AUROC") == {"DSKD": "**90.0**", "PaDiM": "50.0"}
    assert "failed jobs" not in (tmp_path / "report.md").read_text().lower().split("## magnetictile")[1]


def test_the_same_run_gives_the_same_report(tmp_path):
    paths = write_report(small_run(tmp_path / "run"))
    assert [path.name for path in paths] == ["results.csv", "report.md", "report.html"]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_report(tmp_path / "run")] == before


def test_names_and_reasons_cannot_be_markup(tmp_path):
    _, markdown, page = (path.read_text() for path in write_report(small_run(tmp_path / "run")))
    for text in (markdown, page):
        assert "<b>&" not in text
        assert "<script>alert" not in text
        assert "&lt;b&gt;&amp;" in text
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<script>") == 1
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)  # nothing is fetched
    assert "url(" not in page.split("<body>")[0]


# --- images and plot ----------------------------------------------------------------------------------------------


def test_share_below_is_the_auroc_on_average():
    random = np.random.default_rng(0)
    defects, normal = random.integers(3, 12, size=40).astype(float), random.integers(0, 9, size=30).astype(float)
    shares = share_below(defects, normal)
    literal = [np.mean([1.0 if n < d else 0.5 if n == d else 0.0 for n in normal]) for d in defects]
    np.testing.assert_allclose(shares, literal)
    labels = np.repeat([1, 0], [40, 30])
    assert shares.mean() == pytest.approx(roc_auc_score(labels, np.concatenate([defects, normal])))


def photographs(folder, scores) -> list[tuple[str, int, str, float]]:
    """Images whose name starts with ``g`` are normal."""
    folder.mkdir(exist_ok=True)
    images = []
    for index, (name, score) in enumerate(scores.items()):
        path = folder / f"{name}.png"
        Image.fromarray(np.full((20, 40), 20 * index, dtype=np.uint8)).save(path)
        images.append((str(path), int(not name.startswith("g")), "good" if name.startswith("g") else "dent", score))
    return images


def gallery_of(folder, scores_by_model, *, images=2, **arguments):
    records = [done(model, "parts") for model in scores_by_model]
    for record, scores in zip(records, scores_by_model.values(), strict=True):
        write_predictions(folder, record, photographs(folder, scores), **arguments)
    return make_gallery(folder, parsed(*records), images=images)


SCORES = {"g1": 1.0, "g2": 2.0, "g3": 3.0, "g4": 4.0, "d1": 0.0, "d2": 2.5, "d3": 9.0, "d4": 8.0}


def decode(image) -> np.ndarray:
    kind, _, data = image.uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as decoded:
        return np.asarray(decoded.convert("RGB")).astype(int)


def test_gallery_shows_the_worst_and_the_best_on_average_over_the_models(tmp_path):
    other = {**SCORES, "d1": 9.0, "d2": 1.5}  # d1: 0 and 1; d2: 1/2 and 1/4; d3, d4: 1, by score
    gallery = gallery_of(tmp_path, {"A": SCORES, "B": other})
    assert gallery.columns == ["Input", "Mask", "A", "B"]
    names = {title: [example.name for example in examples] for title, examples in gallery.groups}
    assert names == {
        "Hardest defects": ["d2.png", "d1.png"],
        "Easiest defects": ["d3.png", "d4.png"],
        "Normal images with the highest scores": ["g4.png", "g3.png"],
    }
    worst = gallery.groups[0][1][0]
    assert (worst.kind, worst.rank) == ("dent", "scores above 37.5 % of the normal images, mean of 2 models")
    assert [image.caption for image in worst.images] == ["", "", "above 50.0 %", "above 25.0 %"]
    normal = gallery.groups[2][1][0]
    assert normal.rank == "scores above 37.5 % of the defects, mean of 2 models"
    assert (normal.images[1].uri, normal.images[1].reason) == (None, "normal")


def test_gallery_does_not_show_an_image_twice(tmp_path):
    gallery = gallery_of(tmp_path, {"A": SCORES}, images=3)
    assert [[example.name for example in examples] for _, examples in gallery.groups[:2]] == [
        ["d1.png", "d2.png", "d4.png"],
        ["d3.png"],
    ]


def test_images_have_the_shape_of_the_input_and_the_colors_of_the_map(tmp_path):
    gallery = gallery_of(tmp_path, {"A": SCORES})
    photograph, mask, heat = map(decode, gallery.groups[0][1][0].images)
    assert photograph.shape == mask.shape == heat.shape == (SIDE // 2, SIDE, 3)
    assert np.abs(photograph - 80).max() <= 3  # the fifth image's gray, within JPEG's error
    assert mask[:40, :90].min() > 250
    assert mask[56:, 100:].max() < 5
    assert heat[10:30, 10:70].mean() > 150
    assert heat[60:, 110:].mean() < 15
    assert np.abs(heat[47, 10:80] - OUTLINE).max() < 40  # the mask's lower edge


def test_heatmap_is_scaled_by_the_models_own_range(tmp_path):
    record = done("A", "parts")
    images = photographs(tmp_path, SCORES)
    heatmaps = []
    for scale, offset in ((1.0, 0.0), (500.0, -40.0)):
        write_predictions(tmp_path, record, images)
        path = tmp_path / "jobs" / record["job"] / "predictions.npz"
        with np.load(path) as arrays:
            values = dict(arrays)
        values["maps"] = (values["maps"].astype(np.float64) * scale + offset).astype(np.float16)
        np.savez_compressed(path, **values)
        heatmaps.append(decode(make_gallery(tmp_path, parsed(record), images=1).groups[0][1][0].images[2]))
    assert np.abs(heatmaps[0] - heatmaps[1]).max() <= 4


def test_missing_images_are_replaced_by_the_reason(tmp_path):
    gallery = gallery_of(tmp_path, {"A": SCORES}, maps=False, masks=False)
    (tmp_path / "d1.png").unlink()
    (tmp_path / "d2.png").write_text("This is no image.")
    gallery = make_gallery(tmp_path, parsed(done("A", "parts")), images=2)
    first, second = gallery.groups[0][1]
    assert [image.reason for image in first.images] == ["the file is gone", "no mask", "n/a"]
    assert second.images[0].reason == "the file cannot be read"
    assert all(image.uri is None for image in (*first.images, *second.images))


def test_defect_with_an_empty_mask_says_so(tmp_path):
    record = done("A", "parts")
    write_predictions(tmp_path, record, photographs(tmp_path, SCORES))
    path = tmp_path / "jobs" / record["job"] / "predictions.npz"
    with np.load(path) as arrays:
        np.savez_compressed(tmp_path / "empty.npz", **{**arrays, "masks": arrays["masks"] * 0})
    (tmp_path / "empty.npz").rename(path)
    assert make_gallery(tmp_path, parsed(record), images=1).groups[0][1][0].images[1].reason == "empty mask"


def test_models_need_not_have_the_same_images(tmp_path):
    records = [done("A", "parts", "a"), done("B", "parts", "a"), done("A", "parts", "b")]
    for record, folder in zip(records, ("x", "x", "y"), strict=True):
        write_predictions(tmp_path, record, photographs(tmp_path / folder, SCORES))
    gallery = make_gallery(tmp_path, parsed(*records), images=2)
    assert [example.kind for example in gallery.groups[0][1]] == ["a dent", "b dent"]
    other = gallery.groups[0][1][1]
    assert (other.rank, other.images[3].reason) == ("scores above 0.0 % of the normal images", "n/a")


def test_gallery_shows_the_first_seed(tmp_path):
    records = [done("A", "parts", seed=seed) for seed in (1, 0)]
    write_predictions(tmp_path, records[0], photographs(tmp_path, SCORES))
    write_predictions(tmp_path, records[1], photographs(tmp_path, {**SCORES, "d1": 10.0}))
    assert [e.name for e in make_gallery(tmp_path, parsed(*records), images=1).groups[0][1]] == ["d2.png"]


def test_no_gallery_without_predictions_or_something_to_rank_against(tmp_path):
    assert make_gallery(tmp_path, parsed(done()), images=3) is None
    assert gallery_of(tmp_path, {"A": {"d1": 1.0, "d2": 2.0}}) is None
    assert gallery_of(tmp_path, {"A": SCORES}, images=0) is None


def test_unreadable_predictions_are_named(tmp_path):
    record = done()
    write_predictions(tmp_path, record, photographs(tmp_path, SCORES))
    path = tmp_path / "jobs" / record["job"] / "predictions.npz"
    path.write_bytes(path.read_bytes()[:100])
    write_run(tmp_path, record)
    with pytest.raises(DataError, match=rf"{record['job']}/predictions\.npz' cannot be read: .* Delete the file"):
        write_report(tmp_path)


def test_a_negative_number_of_images_is_an_error(tmp_path):
    with pytest.raises(ArgumentError, match="gallery_images -1 must be 0, for no gallery, or larger"):
        write_report(tmp_path, gallery_images=-1)


def test_the_plot_has_text_and_the_colors_of_the_page():
    points = [Point("a $x$ <b>", 90.0, 20.0, 10.0), Point("slow", 80.0, 400.0, None), Point("none", 99.0, None, None)]
    svg = draw_accuracy_against_latency(points, accuracy="image AUROC", label='a "label" <')
    assert svg.startswith('<svg role="img" aria-label="a &#34;label&#34; &lt;" ')
    assert ">a $x$ &lt;b&gt;<" in svg
    assert ">slow<" in svg
    assert ">none<" not in svg
    assert "ms per image" in svg
    assert "currentColor" in svg
    assert "var(--accent)" in svg
    assert "#0102" not in svg
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(set(ids)) == len(ids)
    assert not [name for name in ids if re.search(r"_\d+$", name)]


def test_names_next_to_the_points_do_not_overlap():
    points = [Point(f"model {index}", 90 + 0.01 * index, 10.0 + index, None) for index in range(12)]
    svg = draw_accuracy_against_latency(points, accuracy="image AUROC", label="")
    heights = [float(y) for y in re.findall(r'translate\([\d.]+ ([\d.]+)\)"[^>]*>model \d+<', svg)] or [
        float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>model \d+<', svg)
    ]
    assert len(heights) == 12
    assert np.diff(sorted(heights)).min() > 10  # the font size is 9


def test_without_latencies_there_is_no_plot(tmp_path):
    assert draw_accuracy_against_latency([Point("a", 90.0, None, None)], accuracy="", label="") is None
    write_report(write_run(tmp_path, done(speed={})))
    assert "<figure>" not in (tmp_path / "report.html").read_text()


# --- faulty run folders ------------------------------------------------------------------------------------------


def test_missing_run_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"run folder '.*nowhere' does not exist\. Give the folder that .* wrote"):
        write_report(tmp_path / "nowhere")


def test_the_error_for_a_folder_without_results_lists_its_files(tmp_path):
    with pytest.raises(DataError, match=r"has no results\.jsonl; it holds nothing\. Give the folder"):
        write_report(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(DataError, match=r"has no results\.jsonl; it holds config\.yaml\."):
        write_report(tmp_path)


@pytest.mark.parametrize("tail", ["", '{"job": "1", "sta'])
def test_no_finished_job_is_no_report(tmp_path, tail):
    with pytest.raises(DataError, match=r"results\.jsonl' holds no finished job\. Let the benchmark finish one"):
        write_report(write_run(tmp_path, tail=tail))


def test_the_error_for_a_corrupt_line_has_its_number(tmp_path):
    write_run(tmp_path, done(), tail="nonsense\n" + json.dumps(done("PaDiM")) + "\n")
    with pytest.raises(DataError, match=r"line 2 of '.*results\.jsonl' is not a result of a benchmark"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model None is not a string"),
        ({"seed": "0"}, "seed '0' is not an integer"),
        ({"metrics": {"AUPRO": "high"}}, "metrics.AUPRO 'high' is not a number or null"),
        ({"metrics": {"AUROC": 0.5}}, "metrics.AUROC is not a field of a result"),
        ({"figures": {}}, "figures is not a field of a result"),
        ({"status": "half"}, "status 'half' is not 'done' or 'failed'"),
        ({"cost": {"macs": 1.5}}, "cost.macs 1.5 is not an integer or null"),
        ({"speed": [1.0]}, r"speed \[1.0\] is not a mapping"),
        ({"speed": 5}, "speed 5 is not a mapping"),
        ({"weights": ["resnet18"]}, "weights.0 'resnet18' is not a mapping"),
        ({"weights": [{"file": "a.pth"}]}, "weights.0.name is missing"),
        ({"classes": {"Crack": 1}}, "classes.Crack 1 is not a mapping"),
    ],
)
def test_the_error_for_a_faulty_line_names_the_field(tmp_path, changes, message):
    record = done(**changes)
    with pytest.raises(
        DataError, match=rf"line 1 of .*results\.jsonl' is not a result of a benchmark: {message}\. Delete that line"
    ):
        write_report(write_run(tmp_path, record))


def test_two_jobs_with_the_same_model_data_and_seed_are_an_error(tmp_path):
    twin = {**done(), "job": "000000000000"}
    with pytest.raises(DataError, match=r"000000000000 .* are both DSKD on MagneticTile, category None, seed 0"):
        write_report(write_run(tmp_path, done(), twin))


def test_a_report_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "report.md").mkdir()
    with pytest.raises(DataError, match=r"report in '.*' cannot be written: .*report\.md"):
        write_report(write_run(tmp_path, done()))
