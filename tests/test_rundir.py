"""The run's folder: whatever is there is complete."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from gankit import UsageError
from gankit.files import held, write_atomic
from gankit.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, None, "ring")


WEIGHTS = {"generator": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}}


def test_folders_are_numbered_and_names_are_safe(tmp_path: Path) -> None:
    paths = [RunDir.create(tmp_path, None, "my data/x y").path.name for _ in range(2)]
    assert paths == ["00000-my-data-x-y", "00001-my-data-x-y"]
    assert RunDir.create(tmp_path, "mine", "x").path.name == "mine"
    with pytest.raises(UsageError, match="exists"):
        RunDir.create(tmp_path, "mine", "x")


def test_find_by_path_name_number_and_newest(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (RunDir.create(tmp_path, None, label).path / "config.toml").write_text("")
    os.utime(tmp_path / "00000-a" / "config.toml", (0, 0))
    out = str(tmp_path)
    assert RunDir.find(None, out).path.name == "00001-b"
    assert RunDir.find("00000-a", out).path.name == "00000-a"
    assert RunDir.find("1", out).path.name == "00001-b"
    assert RunDir.find("0", out).path.name == "00000-a"
    assert RunDir.find(str(tmp_path / "00000-a"), "elsewhere").path.name == "00000-a"
    with pytest.raises(UsageError, match="00000-a, 00001-b"):
        RunDir.find("7", out)


def test_checkpoints_round_trip_and_load_without_pickle(run: RunDir) -> None:
    state = {"step": 3, "rng": torch.Generator().get_state(), "nested": {"a": [1, 2.5, "x"], "b": None}}
    path = run.save(WEIGHTS, state, 3)
    assert run.checkpoint("latest") == path.resolve() == (run.checkpoints / "latest").resolve()
    loaded = run.load_weights(path, ["generator"])["generator"]
    assert all(torch.equal(loaded[k], v) for k, v in WEIGHTS["generator"].items())
    back = run.load_state(path)
    assert torch.equal(back.pop("rng"), state.pop("rng"))
    assert back == state


def test_pruning_keeps_the_latest_and_the_best(run: RunDir) -> None:
    for step in (1, 2, 3, 4):
        path = run.save(WEIGHTS, {}, step)
        if step == 1:
            run.link("best", path)
    run.prune(2)
    assert [p.name for p in run.steps()] == ["step-000001", "step-000003", "step-000004"]
    assert run.checkpoint().name == "step-000001"
    assert run.checkpoint("3").name == "step-000003"
    with pytest.raises(UsageError, match="no checkpoint '2'"):
        run.checkpoint("2")


def test_without_a_best_the_latest_counts(run: RunDir) -> None:
    run.save(WEIGHTS, {}, 5)
    assert run.checkpoint().name == "step-000005"
    with pytest.raises(UsageError, match="no checkpoint 'best'"):
        run.checkpoint("best")


def test_steps_of_a_million_and_more_come_last(run: RunDir) -> None:
    for step in (1_000_000, 900_000):
        run.save(WEIGHTS, {}, step)
        (run.samples / f"fakes-{step:06d}.png").touch()
    assert [path.name for path in run.steps()] == ["step-900000", "step-1000000"]
    assert run.checkpoint("latest").name == "step-1000000"
    (run.samples / "fakes-copy.png").touch()  # of somebody's own
    assert [path.name for path in run.fakes()] == ["fakes-900000.png", "fakes-1000000.png"]
    run.trim(900_000)
    assert {path.name for path in run.samples.glob("*")} == {"fakes-900000.png", "fakes-copy.png"}
    run.link("latest", run.checkpoints / "step-1000000")
    run.prune(1)
    assert [path.name for path in run.steps()] == ["step-1000000"]


def test_a_folder_is_held_once_and_free_again(run: RunDir) -> None:
    with held(run.path), pytest.raises(UsageError, match="being trained by another process"), held(run.path):
        pass
    with held(run.path):
        pass


def test_what_was_read_is_not_read_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run looks at its whole record at each evaluation."""
    read: list[bytes] = []
    monkeypatch.setattr(json, "loads", lambda line, loads=json.loads: read.append(line) or loads(line))
    for step in (1, 2, 3):
        run.append("stats.jsonl", {"step": step})
        assert [row["step"] for row in run.rows("stats.jsonl")] == [*range(1, step + 1)]
        assert len(read) == step
    with (run.path / "stats.jsonl").open("a") as file:
        file.write('{"step": 4')
        file.flush()
        assert len(run.rows("stats.jsonl")) == 3
        file.write("}")
        file.flush()
        assert len(run.rows("stats.jsonl")) == 4
        file.write("\n")
    assert (
        [row["step"] for row in run.rows("stats.jsonl")]
        == [1, 2, 3, 4]
        == [r["step"] for r in RunDir(run.path).rows("stats.jsonl")]
    )


def test_what_was_read_is_read_again_where_it_was_trimmed(run: RunDir) -> None:
    for step in (1, 2, 3):
        run.append("stats.jsonl", {"step": step})
    assert len(run.rows("stats.jsonl")) == 3
    run.trim(1)
    for step in (20, 30, 40):
        run.append("stats.jsonl", {"step": step})
    assert [row["step"] for row in run.rows("stats.jsonl")] == [1, 20, 30, 40]


def test_lines_cut_off_by_a_kill_are_left_out_and_later_ones_forgotten(run: RunDir) -> None:
    run.append("metrics.jsonl", {"step": None, "modes": 8.0})
    for step in (1, 2, 3):
        run.append("metrics.jsonl", {"step": step, "kl": float("nan")})
        (run.samples / f"fakes-{step:06d}.png").touch()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "mo')
    assert [row["step"] for row in run.rows("metrics.jsonl")] == [None, 1, 2, 3]
    assert run.rows("metrics.jsonl")[1]["kl"] is None  # JSON has no NaN
    run.trim(2)
    run.append("metrics.jsonl", {"step": 3})
    assert [row["step"] for row in run.rows("metrics.jsonl")] == [None, 1, 2, 3]
    assert sorted(p.name for p in run.samples.iterdir()) == ["fakes-000001.png", "fakes-000002.png"]


@pytest.mark.parametrize("limit", [0, 200, 1500])
def test_a_full_disk_leaves_no_half_written_checkpoint(run: RunDir, limit: int) -> None:
    run.save(WEIGHTS, {"x": torch.zeros(10)}, 1)
    weights = {"generator": {"w": torch.zeros(1000)}, "discriminator": {"w": torch.zeros(10)}}
    before = sorted(p.name for p in run.checkpoints.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the kernel refuses to grow any file beyond this
    try:
        with pytest.raises(OSError, match="File too large"):
            run.save(weights, {}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == before
    assert run.checkpoint("latest").name == "step-000001"
    run.save(weights, {}, 2)
    assert run.checkpoint("latest").name == "step-000002"


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the folder that names them, then its own name, then the folder that holds that: whenever power fails."""
    happened: list[tuple[str, int | str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        happened.append(("sync", os.fstat(descriptor).st_ino))

    def renamed(source: Path, target: Path) -> None:
        replace(source, target)
        happened.append(("rename", target.name))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    run.save(WEIGHTS, {}, 7)
    names = {path.lstat().st_ino: path.name for path in (run.checkpoints, *run.checkpoints.rglob("*"))}
    assert [(what, names.get(which, which)) for what, which in happened] == [
        ("sync", "generator.safetensors"), ("rename", "generator.safetensors"),
        ("sync", "state.pt"), ("rename", "state.pt"),
        ("sync", "step-000007"), ("rename", "step-000007"),
        ("sync", "checkpoints"), ("rename", "latest"),
    ]  # fmt: skip


@pytest.mark.parametrize("deleted", [(), ("state.pt",)])
def test_pruning_that_is_interrupted_leaves_whole_checkpoints_and_what_is_hidden_goes_later(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, deleted: tuple[str, ...]
) -> None:
    for step in (1, 2, 3):
        run.save(WEIGHTS, {"step": step}, step)

    def killed(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            for name in deleted:
                (path / name).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.prune(1)
    assert [path.name for path in run.steps()] == ["step-000002", "step-000003"]
    assert [run.load_state(path)["step"] for path in run.steps()] == [2, 3]
    (run.checkpoints / ".step-000004.part").mkdir()  # of a save that was killed
    assert len([*run.checkpoints.glob(".step-*")]) == 2
    run.trim(3)
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-000002", "step-000003", "latest"}
    run.prune(1)
    assert [path.name for path in run.steps()] == ["step-000003"]


def test_writing_replaces_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
