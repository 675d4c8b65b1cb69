import json

import pytest

from anomalib_dskd.benchmark import run_folder
from anomalib_dskd.benchmark.config import BenchmarkConfig, DatasetSpec, ModelSpec, expand
from anomalib_dskd.benchmark.run_folder import RunFolder, read_plan, read_results
from anomalib_dskd.errors import ArgumentError, DataError

CONFIG = "seeds:\n- 0\nepochs: 3\n"


def record(job: str, status: str = "done", **more) -> dict:
    return {"job": job, "status": status, **more}


def test_results_are_there_as_soon_as_they_are_appended(tmp_path):
    with RunFolder(tmp_path / "a" / "b", CONFIG) as folder:
        folder.append(record("1"))
        folder.append(record("2", "failed"))
        assert [result["job"] for result in read_results(folder.path)] == ["1", "2"]
        assert folder.finished() == {"1"}  # what failed is tried again


def test_a_later_result_of_a_job_replaces_the_earlier(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        for status in ("failed", "done"):
            folder.append(record("1", status))
            folder.append(record("2", "done"))
        assert [(r["job"], r["status"]) for r in read_results(tmp_path)] == [("1", "done"), ("2", "done")]


def test_a_line_that_was_cut_off_is_dropped_and_the_next_starts_afresh(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(record("1"))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"job": "2", "sta')
    assert [r["job"] for r in read_results(tmp_path)] == ["1"]
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(record("3"))
        assert [r["job"] for r in read_results(tmp_path)] == ["1", "3"]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(record('1'))}\nnonsense\n{json.dumps(record('2'))}\n")
    with pytest.raises(DataError, match="line 2 of .*results.jsonl' is no result"):
        read_results(tmp_path)


def test_another_configuration_is_refused_with_what_differs(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(record("1"))
    changed = CONFIG.replace("epochs: 3", "epochs: 4")
    with pytest.raises(ArgumentError, match=r"-epochs: 3\n\+epochs: 4\nGive another --run_folder"):
        RunFolder(tmp_path, changed).__enter__()
    with RunFolder(tmp_path, CONFIG):  # the refusal has left no lock behind
        pass


def test_a_mistake_may_be_mended_while_nothing_is_done(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.keep_plan(jobs("a"))
        folder.append(record("1", "failed"))
    with RunFolder(tmp_path, "seeds:\n- 1\n") as folder:
        folder.keep_plan(jobs("b"))
    assert (tmp_path / "config.yaml").read_text() == "seeds:\n- 1\n"
    assert read_results(tmp_path) == []
    assert read_plan(tmp_path)[0]["weights"][0]["sha256"] == "b"


def test_weights_may_be_replaced_while_nothing_is_done(tmp_path):
    for sha256 in ("a", "b"):
        with RunFolder(tmp_path, CONFIG) as folder:
            folder.keep_plan(jobs(sha256))
            assert read_results(tmp_path) == []
            folder.append(record(jobs(sha256)[0].id, "failed"))
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.keep_plan(jobs("b"))
    assert [result["job"] for result in read_results(tmp_path)] == [jobs("b")[0].id]


def test_results_without_their_configuration_are_kept(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(record("1", "failed"))
    (tmp_path / "config.yaml").unlink()
    with RunFolder(tmp_path, CONFIG):
        assert [result["job"] for result in read_results(tmp_path)] == ["1"]


def test_a_configuration_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(DataError, match="No space left"):
        RunFolder(tmp_path, CONFIG).__enter__()
    monkeypatch.undo()
    with RunFolder(tmp_path, CONFIG):
        assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_two_benchmarks_do_not_share_a_folder(tmp_path):
    with RunFolder(tmp_path, CONFIG), pytest.raises(ArgumentError, match="in use by another benchmark"):
        RunFolder(tmp_path, CONFIG).__enter__()


def test_a_file_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="run folder '.*file' cannot be written: .*Finished results are kept"):
        RunFolder(tmp_path / "file", CONFIG).__enter__()


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(record("1"))
        monkeypatch.setattr(run_folder.os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device.*give the same command again"):
            folder.append(record("2"))


@pytest.mark.parametrize("name", ["results.jsonl", "config.yaml", ".lock", "jobs", "jobs/0123456789ab/log.txt"])
def test_nothing_is_written_through_a_link(name, tmp_path):
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("mine")
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(precious)
    with pytest.raises(ArgumentError, match=rf"holds links, .*{name}\. Replace them"), RunFolder(folder, "a: 1\n"):
        pass
    assert precious.read_text() == "mine"


def test_the_run_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large_disk")
    with RunFolder(tmp_path / "run", "a: 1\n") as folder:
        folder.append({"job": "a", "status": "done"})
    assert (tmp_path / "large_disk" / "results.jsonl").is_file()


def test_no_results_yet(tmp_path):
    assert read_results(tmp_path) == []


def jobs(sha256: str = "a") -> list:
    models = [ModelSpec({"class_path": f"anomalib_dskd.{name}"}) for name in ("Dskd", "Tad")]
    data = [DatasetSpec({"class_path": "anomalib_dskd.MagneticTile"})]
    weights = [{"name": "resnet18", "file": "resnet18.pth", "sha256": sha256}]
    return expand(BenchmarkConfig(models, data, epochs=3), weights)


def test_all_jobs_are_written_down_before_the_first(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        assert read_plan(tmp_path) is None
        folder.keep_plan(jobs())
        folder.keep_plan(jobs())
    plan = read_plan(tmp_path)
    assert [(job["job"], job["model"]) for job in plan] == [(job.id, job.model) for job in jobs()]


def test_jobs_that_have_become_others_are_refused_with_what_has_changed(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.keep_plan(jobs("a"))
        folder.append(record("1"))
        with pytest.raises(
            ArgumentError, match=r"of other jobs.*: Dskd: weights was .*'sha256': 'a'.* is .*'sha256': 'b'"
        ):
            folder.keep_plan(jobs("b"))
        with pytest.raises(ArgumentError, match="2 jobs were, 1 are now"):
            folder.keep_plan(jobs()[:1])


@pytest.mark.parametrize("content", ["{", "[1]", '[{"model": "DSKD"}]'])
def test_a_damaged_plan_is_named(content, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(DataError, match="plan.json' is no plan of a benchmark"):
        read_plan(tmp_path)


@pytest.mark.parametrize("line", ['{"job": "1"}', '{"job": "1", "status": "half"}', "[]", "5", '{"job": "\xff"}'])
def test_a_line_that_is_no_result_is_named(line, tmp_path):
    (tmp_path / "results.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match="line 1 of .*results.jsonl' is no result"):
        read_results(tmp_path)
