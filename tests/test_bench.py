"""`gankit bench`: suites, cells that are ordinary runs, continuation, engines, statistics and tables."""

import base64
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from processes import CONTEXT, command, inside
from rich.console import Console

from gankit import UsageError, bench, protocols, results
from gankit.cli import main, read_settings
from gankit.config import Config
from gankit.files import held, write_atomic
from gankit.losses import make
from gankit.options import options_of
from gankit.plugins import create
from gankit.provenance import metric_of
from gankit.results import Row
from gankit.rundir import to_json
from gankit.terminal import Terminal, show_bench

ROOT = Path(__file__).parents[1]
SUITE = """
title = "Two methods"
protocol = "of a test"
seeds = 2
baseline = "none"
target = { modes = 1 }

[settings]
z_dim = 2
z = "normal"
width = 8
steps = STEPS
batch = 16
eval_samples = 200
eval_every = EVERY
save_every = 10
log_every = 5
options.r1.weight = 3

[data.ring]
data = "ring"

[methods.none]

[methods.r1]
plugin = ["r1"]

[methods.broken]
plugin = ["packing"]
options.packing.m = 3

[[published]]
data = "ring"
method = "r1"
source = "a paper"
modes = 7.9
high_quality = 0.977
"""


def suite_file(folder: Path, steps: int = 30) -> Path:
    path = folder / "two.toml"
    path.write_text(SUITE.replace("STEPS", str(steps)).replace("EVERY", str(steps // 3)))
    return path


@pytest.fixture(scope="module", autouse=True)
def cells_start_at_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In processes that have torch already; a stopped suite's and Ray's start as they do for a person."""

    def call(self: bench.Children, arguments: Sequence[str], threads: int) -> tuple[int, str]:
        folder = tmp_path_factory.mktemp("cell")
        process = CONTEXT.Process(target=inside, args=(folder, command, *arguments))
        process.start()
        process.join()
        return process.exitcode, (folder / "output").read_text()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.Children, "call", call)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[bench.Suite, Path]:
    folder = tmp_path_factory.mktemp("bench")
    suite = bench.read(str(suite_file(folder)))
    bench.execute(suite, folder / "two", jobs=2)
    return suite, folder / "two"


def quiet() -> Terminal:
    return Terminal(Console(quiet=True))


def numbers(rows: list[Row]) -> list[tuple[object, ...]]:
    return [(row.data, row.method, row.seed, row.status, row.reason, row.metrics) for row in rows]


@pytest.mark.parametrize("name", bench.shipped())
def test_a_shipped_suite_asks_for_what_exists(name: str) -> None:
    suite = bench.read(name)
    assert suite.protocol and suite.about and suite.baseline in suite.methods
    for cell in suite.cells()[: len(suite.data) * len(suite.methods)]:
        config = suite.config(cell)
        create(config.plugin, {k: v for k, v in config.options.items() if k != "loss"})
        make(config.loss, **config.options.get("loss", {}))
        assert config.threads != "auto" and config.seed == cell.seed
    for row in suite.published:
        assert row["data"] in suite.data and row["method"] in suite.methods and row["source"], row


def test_settings_go_from_all_to_one() -> None:
    suite = bench.Suite(
        "s", "s", "p",
        data={"a": {"data": "ring", "steps": 5, "options": {"r1": {"weight": 2}}}, "b": {"data": "grid"}},
        methods={"m": {"plugin": ["r1"], "options": {"r1": {"every": 4}}}, "n": {}},
        settings={"steps": 9, "batch": 7, "options": {"r1": {"weight": 1, "every": 1}, "loss": {"a": 0}}},
        seeds=2,
    )  # fmt: skip
    a = suite.config(bench.Cell("a", "m", None, 1))
    assert (a.data, a.steps, a.batch, a.seed, a.threads) == ("ring", 5, 7, 1, 1)
    assert a.options["r1"] == {"weight": 2, "every": 4}
    assert suite.config(bench.Cell("b", "m", 11, 0)).steps == 11
    assert "r1" not in suite.config(bench.Cell("a", "n", None, 0)).options  # of a plugin that is off
    assert [cell.name for cell in suite.cells()] == [f"{d}-{m}-s{s}" for s in (0, 1) for d in "ab" for m in "mn"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("seeds = 2", "seed = 2"), "did you mean 'seeds'"),
        (('protocol = "of a test"', ""), "needs 'protocol'"),
        (('baseline = "none"', 'baseline = "nothing"'), "none of its methods"),
        (("[methods.none]", '[methods.none]\nbaseline = "nothing"'), "none of its methods"),
        (("[data.ring]", '[data.ring]\nbaseline = "none"'), "no setting 'baseline'"),
        (("seeds = 2", "seeds = 0"), "from 1 on"),
        (('baseline = "none"', "baseline = 3"), "baseline must be text, not 3"),
        (('baseline = "none"', 'baseline = ["none"]'), "baseline must be text, not"),
        (('title = "Two methods"', "title = 3"), "title must be text, not 3"),
        (('title = "Two methods"', "about = 3"), "about must be text, not 3"),
        (("modes = 7.9", 'modes = "7.9 +- 0.1"'), r"modes of a paper must be a number, not '7\.9 \+- 0\.1'"),
        (('method = "r1"', 'method = "r2"'), "one of the suite's methods"),
        (('source = "a paper"', "source = 3"), "source must be text, not 3"),
        (("seeds = 2", "seeds = 2\nfirst_seed = -1"), "first_seed must be a whole number from 0 on"),
        (("seeds = 2", "seeds = true"), "seeds must be a whole number from 1 on, not True"),
        (("seeds = 2", "seeds = 10001"), "10001 seeds are too many"),
        (("seeds = 2", 'seeds = 2\nsteps = ["4"]'), "steps must be whole numbers from 1 on, not '4'"),
        (("seeds = 2", "seeds = 2\nsteps = [4.0]"), r"steps must be whole numbers from 1 on, not 4\.0"),
        (("[methods.none]", '[methods."a/b"]\n[methods.none]'), "'a/b' cannot be part of a folder's name"),
        (("[data.ring]", '[data.".ring"]\ndata = "ring"\n[data.ring]'), "'.ring' cannot be part of a folder's name"),
        (("width = 8", "width = 8\nseed = 5"), r"'seed' of a run is made by the suite: leave it out of \[settings\]"),
        (("[methods.none]", '[methods.none]\nname = "x"'), r"leave it out of \[methods.none\]"),
        (("width = 8", "widht = 8"), "did you mean 'width'"),
        (("[methods.none]", "[methods]\nnone = 3"), "'methods.none' is a table"),
        (('[data.ring]\ndata = "ring"', '[data]\nring = "ring"'), "'data.ring' is a table"),
        (("options.r1.weight = 3", "options = 3"), "'settings.options' is a table"),
        (("options.r1.weight = 3", "options.r1 = 3"), "'settings.options.r1' is a table"),
        (("options.r1.weight = 3", "options.r_1.weight = 3"), "options of 'r_1', which is not .* mean 'r1'"),
        (("options.packing.m = 3", "options.r1.m = 3"), "options of 'r1', which is not switched on"),
        (('data = "ring"\nmethod = "r1"', 'method = "r1"'), "names its source, one of the suite's methods"),
        (("target = { modes = 1 }", "target = { mode = 1 }"), "mode = 1 .did you mean 'modes'"),
        (("target = { modes = 1 }", 'target = { modes = "1" }'), "least number of modes"),
        (("target = { modes = 1 }", "target = { fid = 10 }"), "least number of modes"),
        (
            ("[methods.none]", '[data.ring-a]\ndata = "ring"\n[methods.a-none]\n[methods.none]'),
            "folder 'ring-a-none-s0'",
        ),
    ],
)
def test_a_wrong_suite_is_one_sentence(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    path = suite_file(tmp_path)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(UsageError, match=said):
        bench.read(str(path))


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no suite 'rign'.*did you mean 'ring'"):
        bench.read("rign")
    suite = bench.read(str(suite_file(tmp_path)))
    with pytest.raises(UsageError, match="has no 'r2'; it has none, r1, broken"):
        bench.narrowed(suite, seeds=None, methods=["r2"], data=[], steps=None)
    only = bench.narrowed(suite, seeds=range(5), methods=["r1"], data=[], steps=7)
    assert (only.baseline, only.seeds, only.steps, [*only.methods]) == (None, 5, (7,), ["r1"])


@pytest.mark.parametrize(("text", "seeds"), [("1", [0]), ("3", [0, 1, 2]), ("5-9", [5, 6, 7, 8, 9]), ("2-2", [2])])
def test_seeds_are_a_number_or_a_range(text: str, seeds: list[int], tmp_path: Path) -> None:
    arguments = ["bench", str(suite_file(tmp_path)), "--method", "r1", "--seeds", text, "--dry-run"]
    listed = CliRunner().invoke(main, arguments).output.split()
    runs = [f"ring-r1-s{seed}" for seed in seeds]
    assert [name for name in listed if name.startswith("ring-")] == runs
    as_json = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert as_json == [{"suite": "two", "run": run, "state": "missing"} for run in runs]


def test_every_cell_is_a_run_and_a_failed_one_a_row(finished: tuple[bench.Suite, Path]) -> None:
    suite, out = finished
    rows = results.write(suite, out, quiet())
    assert [(r.method, r.seed, r.status) for r in rows] == [
        ("none", 0, "finished"), ("r1", 0, "finished"), ("broken", 0, "failed"),
        ("none", 1, "finished"), ("r1", 1, "finished"), ("broken", 1, "failed"),
    ]  # fmt: skip
    assert rows[2].reason.startswith("packing joins 3 samples")
    config = (out / "runs" / "ring-r1-s1" / "config.toml").read_text()
    assert "seed = 1" in config and "threads = 1" in config and "weight = 3" in config
    assert (out / "runs" / "ring-r1-s1" / "checkpoints" / "latest" / "state.pt").exists()
    summary = json.loads((out / "runs" / "ring-r1-s1" / "summary.json").read_text())
    assert rows[4].metrics == summary["metrics"]
    assert not list(out.glob("runs/*/*.html"))  # which nobody would open: `gankit report` makes them
    text = (out / "results.md").read_text()
    assert "| a paper | 7.9 | 97.7% |" in text and "`broken` failed: seed 0: packing joins" in text
    again, loaded = results.load(out / "results.json")
    assert (again, loaded) == (suite, rows)
    assert results.markdown(again, loaded, {"ring": "samples-ring.png"}) == text
    assert "](samples-ring.png)" in text
    drawn = Image.open(out / "samples-ring.png").convert("RGB")  # two methods of four places
    cells = [np.asarray(drawn.crop((310 * i, 0, 310 * (i + 1), drawn.height))).astype(int) for i in range(2)]
    assert drawn.width == 620 and all(((p[..., 0] - p[..., 1]) > 60).any() for p in cells)
    assert (cells[0] != cells[1]).any()


def test_a_finished_suite_trains_nothing_again(finished: tuple[bench.Suite, Path]) -> None:
    suite, out = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    calls: list[tuple[object, int, int]] = []
    bench.execute(suite, out, report=lambda *call: calls.append(call))
    assert calls == [(None, 6, 6)]
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors")}
    other = bench.narrowed(suite, seeds=None, methods=["r1"], data=[], steps=None)
    other.methods["r1"]["batch"] = 32
    try:
        with pytest.raises(UsageError, match=r"other settings \(batch: 16 -> 32\)"):
            bench.execute(other, out)
    finally:
        del other.methods["r1"]["batch"]


def test_retry_trains_what_failed(finished: tuple[bench.Suite, Path], tmp_path: Path) -> None:
    suite, _ = finished
    suite = bench.narrowed(suite, seeds=range(1), methods=["none"], data=[], steps=5)
    folder = tmp_path / "runs" / "ring-none-5-s0"
    folder.mkdir(parents=True)
    (folder / bench.FAILED).write_text('{"exit_code": null, "reason": "the machine went away"}\n')
    bench.execute(suite, tmp_path)
    assert results.collect(suite, tmp_path)[0].reason == "the machine went away"
    bench.execute(suite, tmp_path, retry=True)
    assert results.collect(suite, tmp_path)[0].status == "finished"


def test_what_was_begun_with_other_settings_is_refused_and_what_failed_so_begins_anew(
    finished: tuple[bench.Suite, Path], tmp_path: Path
) -> None:
    suite, out = finished
    suite = bench.narrowed(suite, seeds=range(1), methods=["none"], data=[], steps=None)
    run = tmp_path / "runs" / "ring-none-s0"
    shutil.copytree(out / "runs" / "ring-none-s0", run, symlinks=True)
    (run / "summary.json").unlink()
    assert bench.state_of(run) == "begun"
    other = replace(suite, settings={**suite.settings, "batch": 8})
    with pytest.raises(UsageError, match=r"other settings \(batch: 16 -> 8\)"):
        bench.execute(other, tmp_path)
    fewer = replace(suite, settings={key: value for key, value in suite.settings.items() if key != "width"})
    with pytest.raises(UsageError, match=r"other settings \(width: 8 -> 96\)"):
        bench.execute(fewer, tmp_path)
    with held(run), pytest.raises(UsageError, match="by another process"):
        bench.execute(suite, tmp_path)
    (run / bench.FAILED).write_text('{"exit_code": 1, "reason": "it diverged"}\n')
    bench.execute(other, tmp_path, retry=True)
    assert [row.status for row in results.collect(suite, tmp_path)] == ["finished"]
    assert "batch = 8" in (run / "config.toml").read_text()


def test_a_retry_that_is_refused_deletes_nothing(finished: tuple[bench.Suite, Path], tmp_path: Path) -> None:
    suite, out = finished
    suite = bench.narrowed(suite, seeds=range(2), methods=["none"], data=[], steps=None)
    runs = [tmp_path / "runs" / f"ring-none-s{seed}" for seed in (0, 1)]
    for run in runs:
        shutil.copytree(out / "runs" / run.name, run, symlinks=True)
    (runs[0] / bench.FAILED).write_text('{"exit_code": 1, "reason": "it diverged"}\n')
    before = sorted(tmp_path.rglob("*"))
    other = replace(suite, settings={**suite.settings, "batch": 8})
    with pytest.raises(UsageError, match=r"ring-none-s1 was made with other settings"):  # the second, which is finished
        bench.execute(other, tmp_path, retry=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["plugin", "network", "data"])
def test_a_retry_begins_anew_where_code_or_data_were_mended(what: str, tmp_path: Path) -> None:
    """``gankit resume`` refuses such a run."""
    code = tmp_path / "own.py"
    code.write_text(
        "from dataclasses import dataclass\nfrom gankit import hookimpl\n"
        "@dataclass(eq=False)\nclass Own:\n    @hookimpl\n    def pre_d_loss(self, step):\n"
        "        assert step < 15, 'a bug'\n"
    )
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef made(shape, z_dim):\n    return nn.Linear(z_dim, shape[0])\n"
    )
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32))
    path = suite_file(tmp_path)
    own = f'data = "{tmp_path}/points.npy"\nplugin = ["{code}:Own"]\ngenerator = "{tmp_path}/nets.py:made"'
    path.write_text(path.read_text().replace('data = "ring"', own, 1).replace("modes = 1", ""))
    suite = bench.narrowed(bench.read(str(path)), seeds=range(1), methods=["none"], data=[], steps=None)
    run = tmp_path / "out" / "runs" / "ring-none-s0"
    bench.execute(suite, tmp_path / "out")
    assert "a bug" in json.loads((run / bench.FAILED).read_text())["reason"] and list(run.glob("checkpoints/step-*"))
    bench.execute(suite, tmp_path / "out", retry=True)  # nothing was mended: from its checkpoint
    assert "a bug" in json.loads((run / bench.FAILED).read_text())["reason"]
    assert [row["step"] for row in map(json.loads, (run / "stats.jsonl").read_text().splitlines())] == [5, 10]
    if what == "plugin":
        code.write_text(code.read_text().replace("step < 15", "step < 99"))
    elif what == "network":
        (tmp_path / "nets.py").write_text((tmp_path / "nets.py").read_text() + "# mended\n")
    else:
        np.save(tmp_path / "points.npy", np.ones((300, 2), np.float32) + np.eye(300, 2, dtype=np.float32))
    (run / bench.FAILED).unlink()
    bench.execute(suite, tmp_path / "out")  # as one that was interrupted
    assert "cannot be continued" in results.collect(suite, tmp_path / "out")[0].reason
    bench.execute(suite, tmp_path / "out", retry=True)
    (row,) = results.collect(suite, tmp_path / "out")
    assert row.status == ("finished" if what == "plugin" else "failed")
    assert ("cannot be continued" in row.reason, "a bug" in row.reason) == (False, what != "plugin")


def test_a_failed_run_that_somebody_continues_has_failed_no_more(
    finished: tuple[bench.Suite, Path], tmp_path: Path
) -> None:
    suite, out = finished
    suite = bench.narrowed(suite, seeds=range(1), methods=["none"], data=[], steps=None)
    run = tmp_path / "runs" / "ring-none-s0"
    shutil.copytree(out / "runs" / run.name, run, symlinks=True)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000030")
    (run / bench.FAILED).write_text('{"exit_code": null, "reason": "the machine went away"}\n')
    assert bench.state_of(run) == "failed"
    done = CliRunner().invoke(main, ["resume", str(run), "--no-report"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert numbers(results.collect(suite, tmp_path)) == numbers(results.collect(suite, out))


def test_a_second_bench_leaves_the_first_ones_runs_alone(
    finished: tuple[bench.Suite, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds a run that was not there when it began: trained by another, now or meanwhile."""
    suite, out = finished
    suite = bench.narrowed(suite, seeds=range(1), methods=["none"], data=[], steps=None)
    run = tmp_path / "runs" / "ring-none-s0"

    def appears(cell: object, done: int, total: int) -> None:
        if cell is None:
            shutil.copytree(out / "runs" / "ring-none-s0", run, symlinks=True)

    bench.execute(suite, tmp_path, report=appears)
    assert (run / "summary.json").stat().st_mtime_ns == (out / "runs" / run.name / "summary.json").stat().st_mtime_ns
    shutil.rmtree(run)

    def is_begun(cell: object, done: int, total: int) -> None:
        if cell is None:
            run.mkdir()
            held_now.enter_context(held(run))

    with ExitStack() as held_now, pytest.raises(UsageError, match="by another process"):
        bench.execute(suite, tmp_path, report=is_begun)
    assert not list(run.iterdir())

    def is_begun_meanwhile(self: bench.Children, arguments: Sequence[str], threads: int) -> tuple[int, str]:
        run.mkdir()
        held_now.enter_context(held(run))
        return 2, f"gankit: {run} exists\n"

    run.rmdir()
    monkeypatch.setattr(bench.Children, "call", is_begun_meanwhile)
    with ExitStack() as held_now, pytest.raises(UsageError, match="by another process"):
        bench.execute(suite, tmp_path)
    assert not list(run.iterdir())


def test_a_local_ray_has_cores_for_as_many_runs_as_are_asked_for(
    finished: tuple[bench.Suite, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class Remote:
        def options(self, **given: Any) -> Any:
            asked.update(given=given["num_cpus"])
            return self

        def remote(self, config: object, home: str) -> object:
            return object()

    def wait(tasks: object, num_returns: int) -> None:
        raise KeyboardInterrupt

    ray = SimpleNamespace(
        is_initialized=lambda: False, init=lambda **given: asked.update(given), shutdown=lambda: None, wait=wait,
        remote=lambda max_retries: lambda function: Remote(),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    suite, _ = finished
    with pytest.raises(KeyboardInterrupt):
        bench.execute(replace(suite, settings={**suite.settings, "threads": 4}), tmp_path, jobs=2, engine="ray")
    assert (asked["given"], asked["num_cpus"]) == (4, 8)  # a task of 4 on a Ray of 2 would wait for ever
    assert asked["address"] == "local"  # not whatever cluster somebody else has started on this machine
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(KeyboardInterrupt):
        bench.execute(suite, tmp_path, jobs=2, engine="ray")
    assert (asked["address"], asked["num_cpus"]) == ("head:6379", None)


def test_as_many_runs_at_a_time_as_their_threads_have_cores(
    finished: tuple[bench.Suite, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def engine(work: object, out: Path, jobs: int) -> Iterator[Any]:
        asked.append(jobs)
        yield from ()

    monkeypatch.setitem(bench.ENGINES, "processes", engine)
    monkeypatch.setattr(bench, "cores", lambda: 8)
    suite, _ = finished
    for threads, jobs in ((1, None), (4, None), (16, None), (4, 3), ("auto", None)):
        bench.execute(replace(suite, settings={**suite.settings, "threads": threads}), tmp_path, jobs=jobs)
    assert asked == [8, 2, 1, 3, 1]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("", ""),
        ("warning: w\ngankit: packing joins 3 samples\n", "packing joins 3 samples"),
        (
            "Traceback (most recent call last):\n  File x\n    y\n  File z\n    ^\n"
            "ValueError: boom\nin plugin 'x', hook 'y'\n",
            "ValueError: boom in plugin 'x', hook 'y'",
        ),
    ],
)
def test_a_reason_is_what_was_said_and_by_whom(said: str, reason: str) -> None:
    assert bench.reason_of(said) == reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (-9, "killed by SIGKILL, which is how a system that runs out of memory ends a process"),
        (-11, "killed by SIGSEGV"),
        (-77, "killed by signal 77"),
        (2, "w"),
    ],
)
def test_a_process_that_a_signal_ended_did_not_fail_of_its_last_warning(
    code: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.Children, "call", lambda self, arguments, threads: (code, "gankit: w\n"))
    bench.train(Config(data="ring", name="a"), tmp_path, bench.Children())
    assert json.loads((tmp_path / "a" / bench.FAILED).read_text()) == {"exit_code": code, "reason": reason}


def test_a_stopped_suite_continues_to_the_same_numbers(tmp_path: Path) -> None:
    path = suite_file(tmp_path, steps=600)
    command = [sys.executable, "-m", "gankit", "bench", str(path), "--out", str(tmp_path / "a"), "--seeds", "1"]
    command += ["--jobs", "1", "--method", "r1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    steps = tmp_path / "a" / "two" / "runs" / "ring-r1-s0" / "checkpoints"
    deadline = time.monotonic() + 300
    while not list(steps.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    assert process.stderr is not None and "the same command continues" in process.stderr.read()
    assert bench.state_of(steps.parent) == "begun" and list(steps.glob("step-*"))
    assert CliRunner().invoke(main, command[3:], catch_exceptions=False).exit_code == 0
    suite = bench.narrowed(bench.read(str(path)), seeds=range(1), methods=["r1"], data=[], steps=None)
    bench.execute(suite, tmp_path / "b")
    assert numbers(results.collect(suite, tmp_path / "a" / "two")) == numbers(results.collect(suite, tmp_path / "b"))


def test_ray_gives_the_same_table(finished: tuple[bench.Suite, Path], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; it is in requirements-dev.txt")
    suite, out = finished
    suite = bench.narrowed(suite, seeds=range(1), methods=["r1", "broken"], data=[], steps=None)
    bench.execute(suite, tmp_path, engine="ray", jobs=2)
    rows = results.collect(suite, tmp_path)
    assert numbers(rows) == numbers(results.collect(suite, out)) and len(rows) == 2
    run = tmp_path / "runs" / "ring-r1-s0"
    assert (run / "checkpoints" / "latest" / "generator_ema.safetensors").exists()
    names = [sorted(p.name for p in (o / "runs" / run.name / "checkpoints").glob("[bl]*")) for o in (tmp_path, out)]
    assert names[0] == names[1] and (run / "checkpoints" / names[0][0]).exists()
    assert CliRunner().invoke(main, ["evaluate", str(run)], catch_exceptions=False).exit_code == 0


def test_an_address_without_ray_is_one_sentence(
    finished: tuple[bench.Suite, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; it is in requirements-dev.txt")
    monkeypatch.setenv("RAY_ADDRESS", "head:port")
    with pytest.raises(UsageError, match=r"no Ray at head:port \(RAY_ADDRESS\): "):
        bench.execute(finished[0], tmp_path, jobs=1, engine="ray")


def test_what_failed_elsewhere_names_the_folder_it_lies_in_here(
    finished: tuple[bench.Suite, Path], tmp_path: Path
) -> None:
    suite, _ = finished
    cell = bench.Cell("ring", "none", None, 0)
    wild = replace(suite.config(cell), lr_g=1e30, lr_d=1e30)
    bench.unpack(bench.train_elsewhere(wild, str(tmp_path)), tmp_path / cell.name)
    assert (
        f"gankit diagnose {tmp_path / cell.name})"
        in json.loads((tmp_path / cell.name / bench.FAILED).read_text())["reason"]
    )


# -- statistics ----------------------------------------------------------------------------------------------------


def test_the_interval_covers_what_it_says() -> None:
    draws = torch.randn(150, results.FEW + 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covered = statistics.fmean((e := results.estimate(x)).low <= 0 <= e.high for x in draws.tolist())
    assert 0.84 < covered < 0.98  # a bootstrap of ten covers a few per cent less than it says
    few = [results.estimate(x[: results.FEW - 1]) for x in draws.tolist()]
    assert [(e.low, e.high) for e in few] == [(min(x[:5]), max(x[:5])) for x in draws.tolist()]


def test_the_interval_holds_the_mean_and_shrinks() -> None:
    torch.manual_seed(0)
    few, many = (torch.randn(n).tolist() for n in (8, 200))
    a, b = results.estimate(few), results.estimate(many)
    assert a.mean == statistics.fmean(few) and a.low < a.mean < a.high
    normal = 1.96 * statistics.stdev(many) / math.sqrt(200)
    assert math.isclose(b.high - b.low, 2 * normal, rel_tol=0.1)
    assert b.high - b.low < a.high - a.low
    assert results.estimate([3.0, 3.0])[:3] == (3, 3, 3)
    assert math.isnan(results.estimate([3.0]).low)


def test_the_paired_test_counts_all_signs() -> None:
    a = {0: 0.5, 1: 0.7, 2: 0.6, 3: 0.9, 4: 0.4, 5: 0.6, 9: 5.0}
    b = {0: 0.4, 1: 0.8, 2: 0.3, 3: 0.5, 4: 0.35, 5: 0.4, 8: -5.0}
    d = [a[s] - b[s] for s in range(6)]
    means = [
        statistics.fmean(sign * x for sign, x in zip(signs, d, strict=True))
        for signs in itertools.product((1, -1), repeat=6)
    ]
    observed = statistics.fmean(d)
    low = sum(m <= observed + 1e-12 for m in means) / 64
    high = sum(m >= observed - 1e-12 for m in means) / 64
    found = results.paired(a, b)
    assert found is not None and found[2] == 6
    assert math.isclose(found[0], observed) and math.isclose(found[1], min(1.0, 2 * min(low, high)))
    assert results.paired(a, a) == (0.0, 1.0, 7)
    del a[0]
    assert results.paired(a, b) is None  # five pairs of signs give no p below 1/16


def test_time_to_target_is_the_first_evaluation_that_holds_all() -> None:
    metrics = [
        {"step": 10, "modes": 8, "high_quality": 0.5},
        {"step": 20, "modes": 7, "high_quality": 0.95},
        {"step": 30, "modes": 8, "high_quality": 0.9},
        {"step": 40, "modes": 8, "high_quality": 0.99},
    ]
    lines = [{"step": 25, "ms/step": 10.0}, {"step": 50, "ms/step": 100.0}]
    target = {"modes": 8, "high_quality": 0.9}
    assert results.time_to_target(metrics, lines, target) == {"step": 30, "seconds": pytest.approx(0.25 + 0.5)}
    assert results.time_to_target(metrics[:2], lines, target) is None
    late = results.time_to_target([{"step": 60, "modes": 8, "high_quality": 1}], lines, target)
    assert late == {"step": 60, "seconds": pytest.approx(0.25 + 2.5 + 1.0)}  # the last line is of step 50
    assert results.time_to_target(metrics, lines, {}) is None


def row(method: str, seed: int, quality: float, gankit: str = "1") -> Row:
    facts = {"protocol": "p", "gankit": gankit}
    return Row("ring", method, 9, seed, "finished", metrics={"high_quality": quality}, truth={}, provenance=facts)


def test_rows_of_other_provenance_are_never_compared(finished: tuple[bench.Suite, Path]) -> None:
    suite, _ = finished
    rows = [row("none", 0, 0.1), row("none", 1, 0.2), row("r1", 0, 0.5, "2"), row("r1", 1, 0.6, "2")]
    tables = results.tabulate(suite, rows)
    assert [[line.method for line in table.lines] for table in tables] == [["none"], ["r1"]]
    assert all(not line.against for table in tables for line in table.lines)
    assert "Only comparable within this table: gankit 2." in results.markdown(suite, rows)
    rows = [row(method, seed, 0.1 * seed + 0.4 * (method == "r1")) for seed in range(6) for method in ("none", "r1")]
    (table,) = results.tabulate(suite, rows)
    test = table.lines[1].against["high_quality"]
    assert test is not None and math.isclose(test[0], 0.4)
    assert ", p = 0.031 |" in results.markdown(suite, rows)  # 2 / 2^6
    other = replace(suite, methods={**suite.methods, "none": {"baseline": "r1"}})
    assert [line.baseline for line in results.tabulate(other, rows)[0].lines] == ["r1", "none"]
    assert "p = 0.031 against `r1` |" in results.markdown(other, rows)
    rows.append(replace(row("r1", 6, 0.0), status="failed", reason="it diverged", metrics={}))
    assert not results.tabulate(suite, rows)[0].lines[1].against  # the seed that is missing would be the worst


def test_the_time_to_a_target_counts_the_runs_that_never_reach_it(finished: tuple[bench.Suite, Path]) -> None:
    suite, _ = finished
    steps: list[int | None] = [5, None, 9, None, 7]
    reached = [None if step is None else {"step": step, "seconds": step / 10} for step in steps]
    rows = [replace(row("r1", s, 0.5), to_target=found) for s, found in enumerate(reached)]
    line = results.tabulate(suite, rows)[0].lines[0]
    assert (line.reached, line.to_target) == (3, {"step": 9, "seconds": 0.9})  # the third of 5, 7, 9, never, never
    rows[2].to_target = None
    line = results.tabulate(suite, rows)[0].lines[0]
    assert (line.reached, line.to_target) == (2, None)


def test_seeds_that_agree_have_no_interval(finished: tuple[bench.Suite, Path]) -> None:
    suite, _ = finished
    assert "| 50.0% on each |" in results.markdown(suite, [row("r1", seed, 0.5) for seed in range(7)])


def test_rows_made_by_two_versions_of_a_plugin_are_never_compared(finished: tuple[bench.Suite, Path]) -> None:
    suite, _ = finished

    def versions(one: Row, **plugins: str) -> Row:
        return replace(one, provenance={**one.provenance, "plugins": plugins})

    rows = [row("none", 0, 0.1), row("none", 1, 0.2), row("none", 2, 0.3)]
    rows += [versions(row("r1", s, 0.5), r1="0.1") for s in (0, 1)] + [versions(row("r1", 2, 0.5), r1="0.2")]
    tables = results.tabulate(suite, rows)
    assert [[(line.method, len(line.seeds)) for line in table.lines] for table in tables] == [
        [("none", 3), ("r1", 2)], [("r1", 1)],
    ]  # fmt: skip
    text = results.markdown(suite, rows)
    assert "within this table: r1 0.1." in text and "within this table: r1 0.2." in text
    one = results.markdown(suite, rows[:5])  # where only one of two methods has the plugin
    assert "Only comparable" not in one and "| `r1` (2 seeds)" in one


def test_rows_of_other_networks_or_data_are_never_compared(finished: tuple[bench.Suite, Path], tmp_path: Path) -> None:
    suite, out = finished
    suite = bench.narrowed(suite, seeds=range(2), methods=["none"], data=[], steps=None)
    shutil.copytree(out / "runs", tmp_path / "runs", symlinks=True)
    assert [len(table.lines[0].seeds) for table in results.tabulate(suite, results.collect(suite, tmp_path))] == [2]
    for name, change in {
        "data.json": lambda found: found["sketch"]["train"].update(std=9.0),
        "env.json": lambda found: found["networks"].update({"nets.py:made": "2"}),
    }.items():
        file = tmp_path / "runs" / "ring-none-s1" / name
        before = file.read_text()
        found = json.loads(before)
        change(found)
        first = tmp_path / "runs" / "ring-none-s0" / "env.json"
        first.write_text(to_json({**json.loads(first.read_text()), "networks": {"nets.py:made": "1"}}))
        file.write_text(to_json(found))
        rows = results.collect(suite, tmp_path)
        tables = results.tabulate(suite, rows)
        assert [table.lines[0].seeds for table in tables] == [[0], [1]]
        said = "content of ring" if name == "data.json" else "nets.py:made 1"
        assert f"Only comparable within this table: {said}" in results.markdown(suite, rows)
        file.write_text(before)


def test_tables_of_two_provenances_say_why_wherever_they_are_shown(finished: tuple[bench.Suite, Path]) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed; it is in requirements-dev.txt")
    suite, out = finished
    rows = [row("none", 0, 0.1), row("none", 1, 0.2), row("r1", 0, 0.5, "2")]
    console = Console(record=True, file=io.StringIO(), width=40)
    show_bench(console, suite, rows, out)
    text = console.export_text()
    shown = [results.Shown("ring", 9, method, 0, {"samples": f"data:{method}"}) for method in ("none", "r1")]
    page = results.html([(suite, rows)], shown)
    for where in (text, page):
        assert where.count("Only comparable within this table: gankit ") == 2
    first, second = page.split("<table")[1:]
    assert ("data:none" in first, "data:r1" in first) == (True, False)
    assert ("data:none" in second, "data:r1" in second) == (False, True)


def test_no_measured_value_is_left_out_of_a_table(finished: tuple[bench.Suite, Path]) -> None:
    suite, _ = finished
    metrics: list[dict[str, float | None]] = [
        {"fid@aa": 1.0, "coverage": 0.5}, {"fid@aa": 2.0, "coverage": 0.7}, {"fid@bb": 9.0, "jsd": 0.1}
    ]  # fmt: skip
    rows = [replace(row("none", s, 0.5), metrics=m, truth={}) for s, m in enumerate(metrics)]
    rows[1].truth = {"fid@aa": 0.1}
    rows[2].truth = {"fid@bb": 0.2}
    (table,) = results.tabulate(suite, rows)
    header, body = results.cells_of(table)
    assert header[1:4] == ["FID (aa)", "FID (bb)", "coverage"] and "Jensen-Shannon" not in header
    assert body[0][1:4] == ["0.100", "0.200", "-"]
    assert body[1][1:4] == ["1.500 (1.000 to 2.000) of 2", "9.000 of 1", "0.6 (0.5 to 0.7) of 2"]


def test_a_table_keeps_its_figures_where_it_is_piped(finished: tuple[bench.Suite, Path]) -> None:
    suite, out = finished
    named = replace(suite, methods={"a_method_of_a_rather_long_name": {}})
    metrics: dict[str, float | None] = {name: 0.98765 for name in results.HEADLINE}
    one = replace(row("a_method_of_a_rather_long_name", 0, 0.5), metrics=metrics)
    for terminal, width in ((False, 80), (True, 60)):
        console = Console(record=True, file=io.StringIO(), width=width, force_terminal=terminal)
        show_bench(console, named, [one], out)
        text = console.export_text()
        assert "\u2026" not in text
        assert terminal or ("a_method_of_a_rather_long_name" in text and text.count("98.8%") == 3)


def test_a_mean_says_of_how_many_it_is_and_what_failed_reached_nothing(finished: tuple[bench.Suite, Path]) -> None:
    suite, _ = finished
    rows = [replace(row("r1", s, 0.1 * s), to_target={"step": 5, "seconds": 1.0}) for s in range(9)]
    rows[3].metrics["high_quality"] = None
    rows.append(replace(row("r1", 9, 0.0), status="failed", reason="gone", metrics={}, steps=0))
    (table,) = results.tabulate(suite, rows)
    header, body = results.cells_of(table)
    cells = dict(zip(header, body[1], strict=True))
    assert cells["high quality"].endswith("] of 8") and cells["target"].startswith("9 of 10,")
    assert cells["method"] == "`r1` (9 of 10 seeds)"
    assert table.lines[0].failed == ["seed 9: gone"]
    few = results.cells_of(results.tabulate(suite, [row("r1", s, 0.25 * s) for s in range(3)])[0])[1][1]
    assert "25.0% (0.0% to 50.0%)" in few


def test_the_page_escapes_what_it_shows(finished: tuple[bench.Suite, Path]) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed; it is in requirements-dev.txt")
    from dataclasses import replace

    suite, out = finished
    page = results.html([(replace(suite, title="<script>alert(1)</script>"), results.collect(suite, out))])
    assert "<script>" not in page and "&lt;script&gt;" in page and "a paper" in page


def test_the_report_of_a_benchmark_begins_with_its_tables(finished: tuple[bench.Suite, Path], tmp_path: Path) -> None:
    for module in ("jinja2", "matplotlib"):
        pytest.importorskip(module, reason=f"{module} is not installed; it is in requirements-dev.txt")
    suite, out = finished
    results.write(suite, out, quiet())
    invoked = CliRunner().invoke(main, ["report", str(out), "--to", str(tmp_path / "r.html")])
    assert invoked.exit_code == 0, invoked.output
    page = (tmp_path / "r.html").read_text()
    header, body = results.cells_of(results.tabulate(suite, results.collect(suite, out))[0])
    table = page[page.index('<table class="bench">') : page.index('id="headline"')]
    for cell in (*header, *(cell for row in body for cell in row)):
        assert cell.replace("`", "").replace("*", "") in table
    assert "broken failed: seed 0: packing joins" in table
    (tmp_path / "results.json").write_text("{}")
    refused = CliRunner().invoke(main, ["report", str(out), str(tmp_path), "--to", str(tmp_path / "r.html")])
    assert refused.exit_code == 2


def test_the_page_shows_what_the_first_seed_of_each_method_makes(
    finished: tuple[bench.Suite, Path], tmp_path: Path
) -> None:
    pytest.importorskip("jinja2", reason="jinja2 is not installed; it is in requirements-dev.txt")
    suite, out = finished
    shown = results.gallery(suite, out / "runs", quiet())
    assert [(run.data, run.steps, run.method, run.seed) for run in shown] == [
        ("ring", 30, "none", 0), ("ring", 30, "r1", 0),
    ]  # fmt: skip
    for run in shown:
        assert list(run.pictures) == ["samples", "between latents"]
        for uri, name in zip(
            run.pictures.values(), ("samples/fakes-000030.png", "interpolation-latest.png"), strict=True
        ):
            folder = out / "runs" / f"ring-{run.method}-s0"
            picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
            with Image.open(folder / name) as recorded:
                same = recorded.convert("RGB").resize(picture.size)
            assert np.abs(np.asarray(picture, float) - np.asarray(same, float)).mean() < 8
    results.write(suite, out, quiet())
    assert (out / "results.html").read_text().count("<img ") == 4
    bare = tmp_path / "runs" / "ring-none-s0"  # whose pictures and checkpoints are gone
    bare.mkdir(parents=True)
    for name in ("config.toml", "summary.json", "data.json"):
        shutil.copy(out / "runs" / "ring-none-s0" / name, bare)
    assert [run.pictures for run in results.gallery(suite, tmp_path / "runs", quiet())] == [{}]


def test_metrics_of_plugins_are_columns(tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", np.random.default_rng(0).integers(0, 255, (200, 16, 16, 3), dtype=np.uint8))
    (tmp_path / "thumbs.py").write_text("def features(images):\n    return images[:, :, ::4, ::4].flatten(1)\n")
    (tmp_path / "images.toml").write_text(
        f"""
protocol = "a test"
seeds = 1
[settings]
plugin = ["ivom", "inception"]
z_dim = 2
width = 4
steps = 2
batch = 8
eval_samples = 20
eval_every = 0
options.ivom = {{ n = 4, steps = 2, restarts = 1 }}
options.inception = {{ extractor = "{tmp_path}/thumbs.py:features", n = 40, kid_subset_size = 10 }}
[data.frames]
data = "{tmp_path}/frames.npy"
[methods.none]
[methods.bigan]
plugin = ["bigan"]
"""
    )
    suite = bench.read(str(tmp_path / "images.toml"))
    bench.execute(suite, tmp_path / "images", jobs=2)
    rows = results.collect(suite, tmp_path / "images")
    assert [row.reason for row in rows] == ["", ""]
    (table,) = results.tabulate(suite, rows)
    names = [metric_of(name) for name in results.chosen(table)]
    distances = ["energy_distance", "sliced_wasserstein"]
    assert names == ["fid", "kid", "precision", "recall", "ivom", "reconstruction_error", *distances]
    header, body = results.cells_of(table)
    place = next(i for i, name in enumerate(header) if name.startswith("reconstruction error"))
    assert {row[0]: row[place] == "-" for row in body[1:]} == {"`none` (1 seed)": True, "`bigan` (1 seed)": False}


# -- command line --------------------------------------------------------------------------------------------------


def test_the_command_line(finished: tuple[bench.Suite, Path], tmp_path: Path) -> None:
    _, out = finished
    invoke = CliRunner().invoke
    listed = invoke(main, ["bench"]).output
    assert all(name in listed for name in bench.shipped())
    assert {s["name"] for s in json.loads(invoke(main, ["bench", "--json"]).output)} == set(bench.shipped())
    path = str(out.parent / "two.toml")
    dry = invoke(main, ["bench", path, "--out", str(out.parent), "--dry-run"]).output
    assert "ring-r1-s0  finished" in dry and "ring-broken-s0  failed" in dry
    done = invoke(main, ["bench", path, "--out", str(out.parent)])
    assert done.exit_code == 0 and "broken failed, seed 0: packing joins" in done.output
    as_json = invoke(main, ["bench", path, "--out", str(out.parent), "--json"])
    assert json.loads(as_json.stdout)[0]["suite"]["name"] == "two"
    for arguments, said in (
        ([path, "--jobs", "0"], "whole number"),
        *(([path, "--seeds", text], "or from which to which") for text in ("0", "some", "9-5", "-3", "1-2-3", "")),
        ([path, "--seeds", "9" * 20], "too many"),
        (["nothing"], "no suite"),
        (["x.toml"], "cannot read"),
    ):
        result = invoke(main, ["bench", *arguments])
        assert result.exit_code == 2 and said in result.output


# -- networks of the papers ----------------------------------------------------------------------------------------


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_papers_networks_have_their_sizes() -> None:
    # PacGAN prints its parameters' numbers; by hand: 3 hidden 400x400, batch norms, input and output with bias
    assert count(protocols.pacgan_generator((2,), 2)) == 2 * 400 + 3 * 400**2 + 4 * 800 + 400 * 2 + 2
    assert count(protocols.pacgan_discriminator([(4,)])) == 5 * 1000 + 2 * 201 * 1000 + 201
    assert count(protocols.unrolled_generator((2,), 256)) == 257 * 128 + 129 * 128 + 129 * 2
    assert count(protocols.veegan_generator((2,), 254)) == 255 * 128 + 129 * 128 + 129 * 2
    assert count(protocols.veegan_discriminator([(2,), (254,)])) == 257 * 128 + 129
    assert count(protocols.veegan_reconstructor((2,), 254)) == 3 * 128 + 129 * 128 + 129 * 254
    first = protocols.veegan_discriminator([(2,), (254,)]).body[0]
    assert first.weight.abs().max() <= math.sqrt(6 / (256 + 128)) and not first.bias.any()
    assert first.weight.std().item() == pytest.approx(math.sqrt(2 / (256 + 128)), rel=0.02)
    g, d = protocols.dcgan_same_generator((3, 28, 28), 100), protocols.dcgan_same_discriminator([(6, 28, 28)])
    x = g(torch.randn(3, 100))
    assert x.shape == (3, 3, 28, 28) and d(torch.cat([x, x], 1)).shape == (3,)
    g, d = protocols.small_dcgan_generator((3, 28, 28), 256), protocols.small_dcgan_discriminator([(3, 28, 28)])
    convolutions = 9 * (64 * 32 + 32 * 16 + 16 * 8 + 8 * 3) + 32 + 16 + 8 + 3
    assert count(g) == 257 * 64 * 4 * 4 + convolutions + 2 * (64 + 32 + 16 + 8)
    assert count(d) == 9 * (3 * 2 + 2 * 4 + 4 * 8) + (2 + 4 + 8) + 2 * (2 + 4 + 8) + 8 * 4 * 4 + 1
    half = protocols.small_dcgan_discriminator([(6, 28, 28)], width=4)
    x = g(torch.randn(3, 256))
    assert x.shape == (3, 3, 28, 28) and half(torch.cat([x, x], 1)).shape == d(x).shape == (3,)
    assert g[0].weight.std().item() == pytest.approx(0.02, rel=0.02) and not g[0].bias.any()
    layer = protocols.unrolled_discriminator([(2,)]).body[2]
    assert torch.allclose(layer.weight @ layer.weight.T, 1.4**2 * torch.eye(128), atol=1e-4)


def test_an_ali_encoder_draws_its_code_from_x_and_the_global_random_numbers() -> None:
    e = protocols.ali_encoder((2,), 2)
    assert count(e) == 4 * 400 + 400**2 + 2 * 800 + 400 * 2 + 2
    assert e.body[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    x = torch.ones(2000, 2)
    torch.manual_seed(0)
    first, second = e(x), e(x)
    assert first.shape == (2000, 2) and not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(e(x), first)
    torch.manual_seed(0)
    by_hand = e.body(torch.cat([x, torch.randn(2000, 2)], 1))
    assert torch.equal(by_hand, first)


def test_maxout_is_the_largest_piece() -> None:
    layer = protocols.Maxout(3, 4, 5)
    x = torch.randn(6, 3)
    pieces = torch.stack([x @ layer.linear.weight[p::5].T + layer.linear.bias[p::5] for p in range(5)])
    assert torch.allclose(layer(x), pieces.max(0).values, atol=1e-6)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("side", [28, 14, 7, 4])
def test_same_deconvolution_is_the_transpose_of_same_convolution(side: int, kernel: int) -> None:
    conv, deconv = protocols.SameConv(2, 3, kernel), protocols.SameDeconv(3, 2, side, kernel)
    torch.nn.init.zeros_(conv.conv.bias)
    torch.nn.init.zeros_(deconv.deconv.bias)
    deconv.deconv.weight.data = conv.conv.weight.data
    x = torch.randn(1, 2, side, side, dtype=torch.float64)
    y = torch.randn(1, 3, math.ceil(side / 2), math.ceil(side / 2), dtype=torch.float64)
    conv, deconv = conv.double(), deconv.double()
    assert conv(x).shape == y.shape
    assert math.isclose((conv(x) * y).sum().item(), (x * deconv(y)).sum().item(), rel_tol=1e-9)


# -- what is published ---------------------------------------------------------------------------------------------


def test_the_page_of_results_and_the_readme_s_table_are_made_from_their_files() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "results" / "make.py"))
    assert (ROOT / "docs" / "results.md").read_text() == made["page"](), "run: python docs/results/make.py"
    assert (ROOT / "README.md").read_text() == made["readme"](), "run: python docs/results/make.py"


def test_the_first_table_of_the_page_has_the_means_and_the_best_paper() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "results" / "make.py"))
    _, rows = results.load(ROOT / "docs" / "results" / "ring.json")
    (line,) = [line for line in made["page"]().splitlines() if line.startswith("| [ring](")]
    for method, cell in zip(("none", "r3gan"), (line.split(" | ")[i] for i in (1, 2)), strict=True):
        mine = [row.metrics for row in rows if row.method == method]
        modes, quality, kl = (
            statistics.fmean(m[name] or 0.0 for m in mine) for name in ("modes", "high_quality", "reverse_kl")
        )
        assert cell == f"`{method}`, {len(mine)} seeds: {modes:.4g} modes, {quality:.1%}, KL {kl:.4f}"
    assert line.split(" | ")[4] == "PacGAN2 in PacGAN, table 1: 7.9 modes, 95.6%, KL 0.0700 |"


def test_the_commands_below_a_table_train_its_lines() -> None:
    for path in sorted((ROOT / "docs" / "results").glob("*.json")):
        suite, rows = results.load(path)
        text = results.markdown(suite, rows)
        commands = re.findall(r"^(gankit run .*)$", text, re.MULTILINE)
        there = {(row.data, row.method) for row in rows}
        cells = [cell for cell in suite.cells() if cell.seed == 0 and (cell.data, cell.method) in there]
        assert len(commands) == len(cells) == len(there)
        for line, cell in zip(commands, cells, strict=True):
            flags = main.commands["run"].make_context("run", shlex.split(line)[2:]).params  # type: ignore[attr-defined]
            own = {key: flags.pop(key) for key in ("dry_run", "reported", "as_json")}
            assert set(own.values()) == {False, True}
            typed, meant = read_settings(flags), replace(suite.config(cell), name=None)
            assert replace(typed, options={}) == replace(meant, options={})
            assert set_up(typed) == set_up(meant)


def set_up(config: Config) -> dict[str, dict[str, Any]]:
    """The options that plugins get."""
    assert "loss" not in config.options
    made, _ = create(config.plugin, config.options)
    return {name: {key: getattr(plugin, key) for key in options_of(type(plugin))} for name, plugin in made.items()}


def test_rows_are_added_to_published_ones(tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "results" / "make.py"))
    whole = ROOT / "docs" / "results" / "ring.json"
    suite, rows = results.load(whole)
    parts = [[row for row in rows if (row.seed < 7 and row.method == "none") == first] for first in (True, False)]
    for i, part in enumerate(parts):
        methods = sorted({row.method for row in part})
        seeds = range(min(row.seed for row in part), 1 + max(row.seed for row in part))
        some = bench.narrowed(suite, seeds=seeds, methods=methods, data=[], steps=None)
        write_atomic(tmp_path / f"part{i}.json", to_json(results.plain(some, part)))
        made["add"](tmp_path / f"part{i}.json", tmp_path)
    assert (tmp_path / "ring.json").read_text() == whole.read_text()

    changed = [replace(row, reason="again") for row in rows if row.seed == 3 and row.method == "r3gan"]
    one = bench.narrowed(suite, seeds=range(3, 4), methods=["r3gan"], data=[], steps=None)
    write_atomic(tmp_path / "one.json", to_json(results.plain(one, changed)))
    made["add"](tmp_path / "one.json", tmp_path)
    _, merged = results.load(tmp_path / "ring.json")
    assert len(merged) == len(rows)
    assert [(row.seed, row.method) for row in merged if row.reason == "again"] == [(3, "r3gan")]

    other = replace(one, settings={**one.settings, "lr_g": 1e-3})
    for wrong in (other, replace(one, steps=(7,)), replace(one, methods={"gone": one.methods["r3gan"]})):
        write_atomic(tmp_path / "wrong.json", to_json(results.plain(wrong, changed)))
        with pytest.raises(UsageError, match=r"wrong\.json is not of the suite ring as it is now"):
            made["merged"](whole, tmp_path / "wrong.json")


UNMEASURED = {  # as the notes of the suites say
    "pacgan": {
        *itertools.product(("ring", "grid"), ("pacgan2", "pacgan3", "pacgan4", "ali")), ("ring", "pacgan2_alternating")
    },
    "stacked-mnist": {("stacked-mnist", "packing2")},
    "veegan": {(data, "unrolled") for data in ("ring", "grid", "gaussians1200")}
    | {("gaussians1200", "gan"), ("gaussians1200", "ali")},
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_a_published_result_is_of_the_shipped_suite(path: Path) -> None:
    suite, rows = results.load(path)
    shipped = bench.read(path.stem)
    for cell in suite.cells():
        assert shipped.config(cell) == suite.config(cell), cell
    seeds: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        seeds.setdefault((row.data, row.method), []).append(row.seed)
    cells = {(c.data, c.method) for c in shipped.cells()}
    assert cells - UNMEASURED.get(path.stem, set()) == seeds.keys()
    for cell, trained in seeds.items():  # not all methods need as many seeds, but none may be picked
        assert sorted(trained) == list(range(len(trained))), cell
    assert max(map(len, seeds.values())) == suite.seeds
    assert suite.published == shipped.published


def test_provenance_is_what_the_run_resolved(finished: tuple[bench.Suite, Path], tmp_path: Path) -> None:
    suite, out = finished
    suite = bench.narrowed(suite, seeds=range(1), methods=["none"], data=[], steps=None)
    run = tmp_path / "runs" / "ring-none-s0"
    shutil.copytree(out / "runs" / "ring-none-s0", run, symlinks=True)
    (row,) = results.collect(suite, tmp_path)
    assert (row.provenance["device"], row.provenance["samples"]) == ("cpu", 200)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('device = "cpu"', 'device = "cuda"'))
    (row,) = results.collect(suite, tmp_path)
    assert row.provenance["device"] == "cuda"  # whatever the name of the graphics card is
