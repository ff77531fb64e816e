"""Benchmarks: data sets x methods x seeds x steps from one TOML file, run in parallel, continued where they stopped.

Every cell is an ordinary run, ``<out>/<suite>/runs/<cell>``, so it can be looked at, sampled from, continued and reported
like any other; what a suite's tables say is read from these folders. See docs/bench.md for the file's format.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from gankit import config as configuration
from gankit.config import Config
from gankit.errors import UsageError
from gankit.files import write_atomic
from gankit.options import closest
from gankit.plugins import snake_case

FAILED = "failed.json"


class Cell(NamedTuple):
    """One run of a suite."""

    data: str
    method: str
    steps: int | None
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return "-".join([self.data, self.method, *([] if self.steps is None else [f"{self.steps}"]), f"s{self.seed}"])


@dataclass(frozen=True)
class Suite:
    """What a benchmark runs and what it is compared with.

    data, methods: settings of a run by name, as in a run's TOML file, options under "options"; plugins of all layers add up.
    seeds: how many, from ``first_seed`` on.
    steps: lengths of training, or () for what the settings say. baseline: the method the others are tested against, on the
    same seeds. target: least values of metrics (``modes``, ``high_quality``) whose first meeting is timed. published: rows
    of papers, each with ``data``, ``method``, ``source`` and metrics.
    """

    name: str
    title: str
    protocol: str
    data: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    seeds: int = 10
    steps: tuple[int, ...] = ()
    baseline: str | None = None
    about: str = ""
    target: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    published: list[dict[str, Any]] = field(default_factory=list)
    first_seed: int = 0

    def cells(self) -> list[Cell]:
        """All runs, seed by seed, so that an interrupted suite has every method on the seeds it has."""
        lengths = self.steps or (None,)
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [Cell(d, m, n, s) for s in seeds for d in self.data for n in lengths for m in self.methods]

    def target_of(self, data: str) -> dict[str, float]:
        """The target on one data set: the suite's, with what the data set says itself."""
        return {**self.target, **self.data[data].get("target", {})}

    def config(self, cell: Cell) -> Config:
        """The configuration of one run; UsageError if the file asks for what does not exist."""
        values: dict[str, Any] = {"threads": 1}
        options: dict[str, dict[str, Any]] = {}
        plugins: list[str] = []
        for layer in (self.settings, self.data[cell.data], self.methods[cell.method]):
            values |= {key: value for key, value in layer.items() if key not in ("options", "plugin", "target")}
            plugins += [name for name in layer.get("plugin", ()) if name not in plugins]
            for owner, chosen in layer.get("options", {}).items():
                options[owner] = {**options.get(owner, {}), **chosen}
        if cell.steps is not None:
            values["steps"] = cell.steps
        on = {snake_case(Path(name.rpartition(":")[2]).stem) for name in plugins} | {"loss"}
        options = {owner: chosen for owner, chosen in options.items() if owner in on}
        try:
            return configuration.make({**values, "plugin": plugins, "seed": cell.seed, "name": cell.name}, options)
        except UsageError as error:
            raise UsageError(f"suite {self.name}, {cell.data}, {cell.method}: {error}") from None


def shipped() -> dict[str, Path]:
    """The suites that come with gankit, by name."""
    folder = Path(str(files("gankit") / "suites"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read(name: str) -> Suite:
    """A shipped suite by name, or the suite in a TOML file; UsageError if it is neither or says what is unknown."""
    known = shipped()
    path = known.get(name, Path(name))
    if name not in known and not path.suffix:
        raise UsageError(
            f"there is no suite {name!r}{closest(name, known)}; there are {', '.join(known)}, or give a .toml file"
        )
    content = configuration.parse_toml(path, "suite")
    keys = sorted(f.name for f in fields(Suite) if f.name != "name")
    for key in content:
        if key not in keys:
            raise UsageError(f"{path}: a suite has no {key!r}{closest(key, keys)}; it has {', '.join(keys)}")
    for key in ("protocol", "data", "methods"):
        if not content.get(key):
            raise UsageError(f"{path}: a suite needs {key!r}")
    for key in ("data", "methods", "settings", "target"):
        if not isinstance(content.get(key, {}), dict):
            raise UsageError(
                f"{path}: {key!r} is a table, [{key}.<name>]"
                if key in ("data", "methods")
                else f"{path}: {key!r} is a table"
            )
    steps = content.pop("steps", [])
    content["steps"] = tuple(steps) if isinstance(steps, list) else (steps,)
    suite = Suite(name=path.stem, **{"title": path.stem, **content})
    if suite.baseline and suite.baseline not in suite.methods:
        raise UsageError(f"{path}: the baseline {suite.baseline!r} is none of its methods, {', '.join(suite.methods)}")
    for key, least in (("seeds", 1), ("first_seed", 0)):
        value = getattr(suite, key)
        if not isinstance(value, int) or value < least:
            raise UsageError(f"{path}: {key} must be a whole number from {least} on, not {value!r}")
    for cell in suite.cells()[: len(suite.data) * len(suite.methods) * max(len(suite.steps), 1)]:
        suite.config(cell)
    return suite


def narrowed(
    suite: Suite, *, seeds: range | None, methods: Sequence[str], data: Sequence[str], steps: int | None
) -> Suite:
    """The suite with other seeds, some of its methods and data sets, or another length of training."""
    for wanted, known in ((methods, suite.methods), (data, suite.data)):
        for name in wanted:
            if name not in known:
                raise UsageError(f"suite {suite.name} has no {name!r}{closest(name, known)}; it has {', '.join(known)}")
    return replace(
        suite,
        seeds=len(seeds) if seeds else suite.seeds,
        first_seed=seeds.start if seeds else suite.first_seed,
        methods={name: m for name, m in suite.methods.items() if not methods or name in methods},
        data={name: d for name, d in suite.data.items() if not data or name in data},
        steps=(steps,) if steps else suite.steps,
        baseline=suite.baseline if not methods or suite.baseline in methods else None,
    )


# -- one cell ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """The suite was stopped; its runs have saved where they were."""


class Children:
    """The processes that train at the moment, so that all can be asked to save and end."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self.lock = threading.Lock()

    def call(self, arguments: Sequence[str], threads: int) -> tuple[int, str]:
        """Run ``gankit ...`` in a process of its own; its exit code and what it said on its error stream."""
        command = [sys.executable, "-m", "gankit", *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with self.lock:
            if self.stopped:
                raise Interrupted
            process = subprocess.Popen(  # a group of its own: Ctrl-C reaches it through ``stop`` alone, once
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, process_group=0
            )
            self.running.add(process)
        _, said = process.communicate()
        with self.lock:
            self.running.discard(process)
        return process.returncode, said

    def stop(self) -> None:
        """Ask every process to save and end, and start no more."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.send_signal(signal.SIGTERM)


def state_of(folder: Path) -> str:
    """What there is of a cell: "finished", "failed", "begun" or "missing"."""
    if (folder / FAILED).exists():
        return "failed"
    if (folder / "summary.json").exists() and json.loads((folder / "summary.json").read_text())["status"] == "finished":
        return "finished"
    return "begun" if folder.exists() else "missing"


def train(config: Config, out: Path, children: Children) -> None:
    """Train one cell, or continue it; a failure is recorded in its folder. Interrupted if it was told to stop."""
    assert config.name is not None
    folder = out / config.name
    threads = config.threads if isinstance(config.threads, int) else os.cpu_count() or 1
    if state_of(folder) == "begun" and any(folder.glob("checkpoints/step-*")):
        arguments = ["resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        wanted = out / f".{config.name}.toml"
        write_atomic(wanted, configuration.to_toml(replace(config, out=str(out))))
        arguments = ["run", "--config", str(wanted)]
    code, said = children.call([*arguments, "--no-report"], threads)
    (out / f".{config.name}.toml").unlink(missing_ok=True)
    if code in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM) or (code and children.stopped):
        raise Interrupted
    if code:
        folder.mkdir(parents=True, exist_ok=True)
        reason = said.strip().splitlines()[-1] if said.strip() else f"exit code {code}"
        write_atomic(folder / FAILED, json.dumps({"exit_code": code, "reason": reason.removeprefix("gankit: ")}) + "\n")


# -- engines -------------------------------------------------------------------------------------------------------

Done = Iterator[tuple[Cell, str | None]]  # each cell that ended, and the reason if the engine itself failed


def processes(work: Mapping[Cell, Config], out: Path, jobs: int) -> Done:
    """Train the cells on this machine, ``jobs`` processes at a time; closing the iterator saves and ends them."""
    children = Children()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, config, out, children): cell for cell, config in work.items()}
        try:
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    error = future.exception()
                    if isinstance(error, Interrupted):
                        raise error
                    yield futures[future], None if error is None else f"{type(error).__name__}: {error}"
        finally:
            children.stop()
            for future in futures:
                future.cancel()


def ray_cluster(work: Mapping[Cell, Config], out: Path, jobs: int) -> Done:
    """Train the cells on a Ray cluster (a local one is started if there is none): a task each, of as many CPUs as threads.

    A task trains in a temporary folder of its node and sends the folder back, so nodes share no disk; gankit, its plugins
    and the data must be installed on each.
    """
    try:
        import ray
    except ImportError:
        raise UsageError('--engine ray needs Ray: pip install "gankit[ray]"') from None
    begun = not ray.is_initialized()
    if begun:
        address = os.environ.get("RAY_ADDRESS")
        ray.init(address=address, num_cpus=None if address else jobs, include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(max_retries=1)(train_elsewhere)
        tasks = {}
        for cell, config in work.items():
            threads = config.threads if isinstance(config.threads, int) else 1
            tasks[remote.options(num_cpus=threads).remote(config)] = cell
        waiting = list(tasks)
        while waiting:
            (first, *_), waiting = ray.wait(waiting, num_returns=1)
            try:
                unpack(ray.get(first), out / tasks[first].name)
                yield tasks[first], None
            except ray.exceptions.RayError as error:
                yield tasks[first], f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    finally:
        if begun:
            ray.shutdown()


ENGINES: dict[str, Callable[[Mapping[Cell, Config], Path, int], Done]] = {"processes": processes, "ray": ray_cluster}


def train_elsewhere(config: Config) -> dict[str, bytes]:
    """Train one cell in a temporary folder; the files of its folder by relative path, with the newest checkpoint alone."""
    with tempfile.TemporaryDirectory() as scratch:
        train(replace(config, keep=1), Path(scratch), Children())
        folder = Path(scratch) / str(config.name)
        found = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not any(parent.is_symlink() for parent in path.parents):
                found[str(path.relative_to(folder))] = path.read_bytes()
        return found


def unpack(content: Mapping[str, bytes], folder: Path) -> None:
    """Write the files of a run that was trained elsewhere: the whole folder, or nothing."""
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    for name, data in content.items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_bytes(data)
    (scratch / "checkpoints").mkdir(parents=True, exist_ok=True)
    newest = max((p.name for p in (scratch / "checkpoints").glob("step-*")), default=None)
    if newest:
        (scratch / "checkpoints" / "latest").symlink_to(newest)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)


# -- a suite -------------------------------------------------------------------------------------------------------


def execute(
    suite: Suite,
    out: Path,
    *,
    jobs: int | None = None,
    engine: str = "processes",
    retry: bool = False,
    report: Callable[[Cell | None, int, int], None] = lambda cell, done, total: None,
) -> None:
    """Train every cell that is not there yet, below ``out/runs``. Interrupted on SIGINT or SIGTERM, when all have saved.

    jobs: runs at a time; None: one per core. retry: also train those again that failed. report: called with the cell that
    ended (None at first), and how many of how many are done.
    """
    runs = out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    work: dict[Cell, Config] = {}
    cells = suite.cells()
    for cell in cells:
        config, folder = suite.config(cell), runs / cell.name
        if state_of(folder) == "finished":
            _need_same(config, folder)
        elif state_of(folder) != "failed" or retry:
            (folder / FAILED).unlink(missing_ok=True)
            work[cell] = config
    done = len(cells) - len(work)
    report(None, done, len(cells))
    with interruptible():
        training = ENGINES[engine](work, runs, jobs or cores())
        try:
            for cell, trouble in training:
                if trouble:
                    (runs / cell.name).mkdir(parents=True, exist_ok=True)
                    write_atomic(runs / cell.name / FAILED, json.dumps({"exit_code": None, "reason": trouble}) + "\n")
                done += 1
                report(cell, done, len(cells))
        finally:
            training.close()  # type: ignore[attr-defined]


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _need_same(config: Config, folder: Path) -> None:
    """Refuse a finished run that another version of the suite asked for."""
    recorded = configuration.plain(configuration.make(*configuration.read_toml(folder / "config.toml")))
    wanted = {key: value for key, value in configuration.plain(config).items() if value is not None}
    ignored = ("out", "device", "threads", "keep")
    changed = configuration.differences({key: recorded[key] for key in wanted}, wanted)
    changed = [change for change in changed if not change.startswith(ignored)]
    if changed:
        raise UsageError(
            f"{folder} was made with other settings ({'; '.join(changed)}): give another --out, or delete it"
        )


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: with Interrupted."""

    def handle(number: int, frame: Any) -> None:
        raise Interrupted

    threaded = threading.current_thread() is not threading.main_thread()
    before = {} if threaded else {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
