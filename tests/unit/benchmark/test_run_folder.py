import pytest

from anomalib_dskd.benchmark import run_folder
from anomalib_dskd.benchmark.config import BenchmarkConfig, DatasetSpec, ModelSpec, expand
from anomalib_dskd.benchmark.job_result import JobResult
from anomalib_dskd.benchmark.run_folder import RunFolder, read_plan, read_results
from anomalib_dskd.errors import ArgumentError, DataError

CONFIG = "seeds:\n- 0\nepochs: 3\n"


FIRST, SECOND, THIRD = (f"{number:012x}" for number in (1, 2, 3))  # IDs of jobs


def result(job: str, status: str = "done") -> JobResult:
    return JobResult.of(jobs()[0], job=job, status=status)


def test_results_can_be_read_as_soon_as_they_are_appended(tmp_path):
    with RunFolder(tmp_path / "a" / "b", CONFIG) as folder:
        folder.append(result(FIRST))
        folder.append(result(SECOND, "failed"))
        assert [found.job for found in read_results(folder.path)] == [FIRST, SECOND]
        assert folder.finished() == {FIRST}  # failed jobs are run again


def test_a_later_result_of_a_job_replaces_the_earlier(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        for status in ("failed", "done"):
            folder.append(result(FIRST, status))
            folder.append(result(SECOND, "done"))
        assert [(found.job, found.status) for found in read_results(tmp_path)] == [(FIRST, "done"), (SECOND, "done")]


def test_an_incomplete_last_line_is_removed(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(result(FIRST))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"job": "2", "sta')
    assert [found.job for found in read_results(tmp_path)] == [FIRST]
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(result(THIRD))
        assert [found.job for found in read_results(tmp_path)] == [FIRST, THIRD]


def test_the_error_for_a_broken_line_has_its_number(tmp_path):
    (tmp_path / "results.jsonl").write_text(f"{result(FIRST).to_json()}\nnonsense\n{result(SECOND).to_json()}\n")
    with pytest.raises(DataError, match="line 2 of .*results.jsonl' is not a result"):
        read_results(tmp_path)


def test_another_configuration_is_an_error_that_lists_the_differences(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(result(FIRST))
    changed = CONFIG.replace("epochs: 3", "epochs: 4")
    with pytest.raises(ArgumentError, match=r"-epochs: 3\n\+epochs: 4\nGive another --run_folder"):
        RunFolder(tmp_path, changed).__enter__()
    with RunFolder(tmp_path, CONFIG):  # the error has released the lock
        pass


def test_the_configuration_may_change_while_no_job_is_done(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.write_plan(jobs("a"))
        folder.append(result(FIRST, "failed"))
    with RunFolder(tmp_path, "seeds:\n- 1\n") as folder:
        folder.write_plan(jobs("b"))
    assert (tmp_path / "config.yaml").read_text() == "seeds:\n- 1\n"
    assert read_results(tmp_path) == []
    assert read_plan(tmp_path)[0]["weights"][0]["sha256"] == "b"


def test_weights_may_change_while_no_job_is_done(tmp_path):
    for sha256 in ("a", "b"):
        with RunFolder(tmp_path, CONFIG) as folder:
            folder.write_plan(jobs(sha256))
            assert read_results(tmp_path) == []
            folder.append(result(jobs(sha256)[0].id, "failed"))
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.write_plan(jobs("b"))
    assert [found.job for found in read_results(tmp_path)] == [jobs("b")[0].id]


def test_results_without_their_configuration_are_not_deleted(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(result(FIRST, "failed"))
    (tmp_path / "config.yaml").unlink()
    with RunFolder(tmp_path, CONFIG):
        assert [found.job for found in read_results(tmp_path)] == [FIRST]


def test_a_configuration_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(DataError, match="No space left"):
        RunFolder(tmp_path, CONFIG).__enter__()
    monkeypatch.undo()
    with RunFolder(tmp_path, CONFIG):
        assert (tmp_path / "config.yaml").read_text() == CONFIG


def test_two_benchmarks_cannot_use_a_folder_at_the_same_time(tmp_path):
    with RunFolder(tmp_path, CONFIG), pytest.raises(ArgumentError, match="in use by another benchmark"):
        RunFolder(tmp_path, CONFIG).__enter__()


def test_a_file_with_the_name_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="run folder '.*file' cannot be written: .*Results of finished jobs are saved"):
        RunFolder(tmp_path / "file", CONFIG).__enter__()


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path, CONFIG) as folder:
        folder.append(result(FIRST))
        monkeypatch.setattr(run_folder.os, "fsync", full)
        with pytest.raises(DataError, match="No space left on device.*run the same command again"):
            folder.append(result(SECOND))


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
        folder.append(result(FIRST))
    assert (tmp_path / "large_disk" / "results.jsonl").is_file()


def test_no_results_yet(tmp_path):
    assert read_results(tmp_path) == []


def jobs(sha256: str = "a") -> list:
    models = [ModelSpec({"class_path": f"anomalib_dskd.{name}"}) for name in ("Dskd", "Tad")]
    data = [DatasetSpec({"class_path": "anomalib_dskd.MagneticTile"})]
    weights = [{"name": "resnet18", "file": "resnet18.pth", "sha256": sha256}]
    return expand(BenchmarkConfig(models, data, epochs=3), weights)


def test_the_plan_lists_all_jobs(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        assert read_plan(tmp_path) is None
        folder.write_plan(jobs())
        folder.write_plan(jobs())
    plan = read_plan(tmp_path)
    assert [(job["job"], job["model"]) for job in plan] == [(job.id, job.model) for job in jobs()]


def test_changed_jobs_are_an_error_that_lists_the_changes(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.write_plan(jobs("a"))
        folder.append(result(FIRST))
        with pytest.raises(
            ArgumentError, match=r"of other jobs.*: Dskd: weights was .*'sha256': 'a'.* is .*'sha256': 'b'"
        ):
            folder.write_plan(jobs("b"))
        with pytest.raises(ArgumentError, match="2 jobs were, 1 are now"):
            folder.write_plan(jobs()[:1])


@pytest.mark.parametrize("content", ["{", "[1]", '[{"model": "DSKD"}]'])
def test_a_damaged_plan_is_an_error(content, tmp_path):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(DataError, match="plan.json' is not the plan of a benchmark"):
        read_plan(tmp_path)


@pytest.mark.parametrize("line", ['{"job": "1"}', '{"job": "1", "status": "half"}', "[]", "5", '{"job": "\xff"}'])
def test_a_line_that_is_not_a_result_is_an_error(line, tmp_path):
    (tmp_path / "results.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match="line 1 of .*results.jsonl' is not a result"):
        read_results(tmp_path)
