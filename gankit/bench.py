"""Benchmarks: data sets x methods x seeds x steps from one TOML file, run in parallel, continued where they stopped.

Every cell is an ordinary run, ``<out>/<suite>/runs/<cell>``, so it can be looked at, sampled from, continued and reported
like any other; what a suite's tables say is read from these folders. See docs/bench.md for the file's format.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from gankit import config as configuration
from gankit.config import Config
from gankit.errors import UsageError
from gankit.files import FAILED, held, write_atomic
from gankit.options import closest, convert
from gankit.plugins import snake_case
from gankit.process import cores, signals

PLACE = ("data", "method", "source")  # of a published row; the rest are metrics
TARGETS = ("modes", "high_quality", "inception_score", "precision", "recall")  # of which more is better
OWN = ("seed", "name", "out")  # settings of a run that the suite makes
MOST_SEEDS = 10_000


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
    same seeds; a method's own "baseline" goes before. target: least values of metrics (``modes``, ``high_quality``) whose
    first meeting is timed. published: rows of papers, each with ``data``, ``method``, ``source`` and metrics.
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
        """All runs, seed by seed, so that an interrupted suite has every method on the seeds it has.

        UsageError for more than MOST_SEEDS seeds.
        """
        if self.seeds > MOST_SEEDS:
            raise UsageError(f"suite {self.name}: {self.seeds} seeds are too many: {MOST_SEEDS} at most")
        lengths = self.steps or (None,)
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [Cell(d, m, n, s) for s in seeds for d in self.data for n in lengths for m in self.methods]

    def target_of(self, data: str) -> dict[str, float]:
        """The target on one data set: the suite's, with what the data set says itself."""
        return {**self.target, **self.data[data].get("target", {})}

    def baseline_of(self, method: str) -> str | None:
        """The method that this one is tested against: its own baseline, else the suite's."""
        named = self.methods[method].get("baseline", self.baseline)
        return named if named in self.methods and named != method else None

    def layers(self, cell: Cell) -> tuple[dict[str, Any], ...]:
        """The tables whose settings a run has, the later over the former."""
        return self.settings, self.data[cell.data], self.methods[cell.method]

    def command(self, cell: Cell) -> str:
        """The ``gankit run`` that trains one run by itself."""
        return shlex.join(["gankit", "run", *configuration.to_flags(replace(self.config(cell), name=None))])

    def plugins(self, cell: Cell) -> list[str]:
        """The plugins of a run: those of all layers."""
        lists = [convert(layer.get("plugin", ()), tuple[str, ...], "plugin") for layer in self.layers(cell)]
        return list(dict.fromkeys(chain.from_iterable(lists)))

    def owners(self, cell: Cell) -> set[str]:
        """Whose options a run takes."""
        return {snake_case(Path(name.rpartition(":")[2]).stem) for name in self.plugins(cell)} | {"loss"}

    def config(self, cell: Cell) -> Config:
        """The configuration of one run; UsageError if the file asks for what does not exist."""
        values: dict[str, Any] = {"threads": 1}
        options: dict[str, dict[str, Any]] = {}
        for layer, own in zip(self.layers(cell), ("", "target", "baseline"), strict=True):
            values |= {key: value for key, value in layer.items() if key not in ("options", "plugin", own)}
            for owner, chosen in layer.get("options", {}).items():
                options[owner] = {**options.get(owner, {}), **chosen}
        if cell.steps is not None:
            values["steps"] = cell.steps
        plugins, on = self.plugins(cell), self.owners(cell)
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
    _need_tables(content, path)
    _need_text(content, path)
    steps = content.pop("steps", [])
    content["steps"] = tuple(steps) if isinstance(steps, list) else (steps,)
    for length in content["steps"]:
        if not _whole(length, 1):
            raise UsageError(f"{path}: steps must be whole numbers from 1 on, not {length!r}")
    suite = Suite(name=path.stem, **{"title": path.stem, **content})
    for baseline in (suite.baseline, *(method.get("baseline") for method in suite.methods.values())):
        if baseline is not None and baseline not in suite.methods:
            raise UsageError(f"{path}: the baseline {baseline!r} is none of its methods, {', '.join(suite.methods)}")
    for key, least in (("seeds", 1), ("first_seed", 0)):
        if not _whole(value := getattr(suite, key), least):
            raise UsageError(f"{path}: {key} must be a whole number from {least} on, not {value!r}")
    cells = suite.cells()
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(
            f"{path}: two of its runs would share the folder {min(twice)!r}: rename a data set or a method"
        )
    first = cells[: len(cells) // suite.seeds]
    for cell in first:
        suite.config(cell)
    for layer in (suite.settings, *suite.data.values(), *suite.methods.values()):
        on = set[str]().union(*(suite.owners(c) for c in first if any(layer is mine for mine in suite.layers(c))))
        for owner in layer.get("options", {}):
            if owner not in on:
                raise UsageError(
                    f"{path}: there are options of {owner!r}, which is not switched on{closest(owner, on)}"
                )
    for row in suite.published:
        if row.get("data") not in suite.data or row.get("method") not in suite.methods or not row.get("source"):
            raise UsageError(
                f"{path}: a [[published]] row names its source, one of the suite's methods and one of its data sets"
            )
        for name, value in row.items():
            if name not in PLACE and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise UsageError(f"{path}: {name} of {row['source']} must be a number, not {value!r}")
    for data in suite.data:
        for name, goal in suite.target_of(data).items():
            if name not in TARGETS or isinstance(goal, bool) or not isinstance(goal, (int, float)):
                raise UsageError(
                    f"{path}: a target is the least number of {', '.join(TARGETS)}, not {name} = {goal!r}"
                    f"{closest(name, TARGETS)}"
                )
    return suite


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _need_tables(content: Mapping[str, Any], path: Path) -> None:
    """Refuse values where tables belong."""
    inner = {f"{key}.{name}": t for key in ("data", "methods") for name, t in _table(content.get(key, {}), key, path)}
    for name in chain(content.get("data", {}), content.get("methods", {})):
        if not name or set(name) & set("/\\\0") or name.startswith("."):
            raise UsageError(f"{path}: {name!r} cannot be part of a folder's name: call it otherwise")
    outer = {key: content.get(key, {}) for key in ("settings", "target")}
    for where, table in {**outer, **inner}.items():
        for key, value in _table(table, where, path):
            if key == "options":
                for owner, chosen in _table(value, f"{where}.options", path):
                    _table(chosen, f"{where}.options.{owner}", path)
            if key == "target" and where in inner:
                _table(value, f"{where}.target", path)
            if key in OWN and where != "target":
                raise UsageError(f"{path}: {key!r} of a run is made by the suite: leave it out of [{where}]")
    rows = content.get("published", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: 'published' is a list of tables, [[published]]")


def _need_text(content: Mapping[str, Any], path: Path) -> None:
    """Refuse other values where text belongs."""
    named = [("baseline", method) for method in content["methods"].values()]
    rows = [(key, row) for row in content.get("published", []) for key in PLACE]
    for key, table in [*((key, content) for key in ("title", "protocol", "about", "baseline")), *named, *rows]:
        if not isinstance(table.get(key, ""), str):
            raise UsageError(f"{path}: {key} must be text, not {table[key]!r}")


def _table(value: Any, where: str, path: Path) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise UsageError(f"{path}: {where!r} is a table, [{where}], not {value!r}")
    return value.items()


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
        seeds=seeds.stop - seeds.start if seeds else suite.seeds,
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
    """Train one cell, or continue it; a failure is recorded in its folder. Interrupted if it was told to stop.

    UsageError if another process trains it, such as one of a second bench of the same suite; it is left as it is.
    """
    assert config.name is not None
    folder = out / config.name
    threads = _threads(config)
    _need_free(folder)
    state = state_of(folder)
    if state == "finished":  # by that other bench, meanwhile
        return
    if state == "begun" and _can_continue(folder):
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
        _need_free(folder)
        _fail(folder, code, _killed(-code) if code < 0 else reason_of(said) or f"exit code {code}")


def _fail(folder: Path, code: int | None, reason: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FAILED, json.dumps({"exit_code": code, "reason": reason}) + "\n")


def _killed(number: int) -> str:
    """Why a process failed that a signal ended; what it said before, such as a warning, was not why."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = ", which is how a system that runs out of memory ends a process" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def _threads(config: Config) -> int:
    """CPU threads that a run may take."""
    return config.threads if isinstance(config.threads, int) else cores()


def _need_free(folder: Path) -> None:
    """UsageError if a process is training there: one that is alive, such as a child of a suite that was killed."""
    if folder.exists():
        with held(folder):
            pass


def reason_of(said: str) -> str:
    """Why a process failed, by its error stream: the last line, or what stands below a traceback, notes included."""
    lines = said.strip().splitlines()
    if not any(line.startswith("Traceback ") for line in lines):
        return "".join(lines[-1:]).removeprefix("gankit: ")
    inside = max(i for i, line in enumerate(lines) if line.startswith((" ", "Traceback ")))
    return " ".join(lines[inside + 1 :])


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
                    if isinstance(error, (Interrupted, UsageError)):
                        raise error
                    yield futures[future], None if error is None else f"{type(error).__name__}: {error}"
        finally:
            children.stop()
            for future in futures:
                future.cancel()


def ray_cluster(work: Mapping[Cell, Config], out: Path, jobs: int) -> Done:
    """Train the cells on the Ray cluster of RAY_ADDRESS, else on one started here: a task each, of as many CPUs as threads.

    A task trains in a temporary folder of its node and sends the folder back, so nodes share no disk; gankit, its plugins
    and the data must be installed on each. A cluster that is there runs as many tasks as it has CPUs for, whatever ``jobs``.
    """
    try:
        import ray
    except ImportError:
        raise UsageError('--engine ray needs Ray: pip install "gankit[ray]"') from None
    begun = not ray.is_initialized()
    threads = {cell: config.threads if isinstance(config.threads, int) else 1 for cell, config in work.items()}
    if begun:
        address = os.environ.get("RAY_ADDRESS") or "local"
        cpus = jobs * max(threads.values(), default=1) if address == "local" else None
        try:
            ray.init(address=address, num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        except (ValueError, OSError) as error:
            raise UsageError(f"no Ray at {address} (RAY_ADDRESS): {str(error).strip() or error!r}") from None
    try:
        remote = ray.remote(max_retries=1)(train_elsewhere)
        home = str(out)
        tasks = {remote.options(num_cpus=threads[cell]).remote(config, home): cell for cell, config in work.items()}
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


def train_elsewhere(config: Config, home: str) -> bytes:
    """Train one cell in a temporary folder; its folder as a tar file, with no checkpoints but the newest and the best.

    home: the folder that it will lie in, which a failure's reason then names.
    """
    with tempfile.TemporaryDirectory() as scratch, io.BytesIO() as packed:
        train(replace(config, keep=1), Path(scratch), Children())
        failed = Path(scratch) / str(config.name) / FAILED
        if failed.exists():
            recorded = json.loads(failed.read_text())
            _fail(failed.parent, recorded["exit_code"], recorded["reason"].replace(scratch, home))
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(Path(scratch) / str(config.name), ".")
        return packed.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Write the files of a run that was trained elsewhere: the whole folder, or nothing."""
    scratch = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(scratch, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        tar.extractall(scratch, filter="data")
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
    """Train every cell that is not there yet, below ``out/runs``. Interrupted on a signal that asks for it, when all have
    saved.

    jobs: runs at a time; None: as many as there are cores for their threads. retry: also train those again that failed.
    report: called with the cell that ended (None at first), and how many of how many are done.
    """
    runs = out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    work: dict[Cell, Config] = {}
    again: dict[Path, bool] = {}  # of what failed: whether it begins anew
    cells = suite.cells()
    for cell in cells:
        config, folder = suite.config(cell), runs / cell.name
        state = state_of(folder)
        if state == "finished" or (state == "begun" and _can_continue(folder)):
            _need_same(config, folder)
        if state == "finished" or (state == "failed" and not retry):
            continue
        _need_free(folder)
        if state == "failed":
            again[folder] = _can_continue(folder) and bool(_changes(config, folder) or _made_otherwise(folder))
        work[cell] = config
    for folder, anew in again.items():  # when nothing is refused any more
        if anew:
            shutil.rmtree(folder)
        else:
            (folder / FAILED).unlink()
    done = len(cells) - len(work)
    report(None, done, len(cells))
    with interruptible():
        most = max(map(_threads, work.values()), default=1)
        training = ENGINES[engine](work, runs, jobs or max(1, cores() // most))
        try:
            for cell, trouble in training:
                if trouble:
                    _fail(runs / cell.name, None, trouble)
                done += 1
                report(cell, done, len(cells))
        finally:
            training.close()  # type: ignore[attr-defined]


def _can_continue(folder: Path) -> bool:
    """Whether a run has a checkpoint; one without begins anew."""
    return any(folder.glob("checkpoints/step-*"))


def _need_same(config: Config, folder: Path) -> None:
    """Refuse a run that another version of the suite asked for."""
    if changed := _changes(config, folder):
        raise UsageError(
            f"{folder} was made with other settings ({'; '.join(changed)}): give another --out, or delete it"
        )


def _changes(config: Config, folder: Path) -> list[str]:
    """What a run was asked for besides what the suite asks for now, recipes filled in; not where and by how many threads."""
    shape = tuple(json.loads((folder / "data.json").read_text())["shape"])
    recorded = configuration.make(*configuration.read_toml(folder / "config.toml"))
    same = {name: getattr(recorded, name) for name in ("out", "device", "threads", "keep")}
    wanted = replace(configuration.resolve(config, shape), **same)
    return configuration.differences(configuration.plain(recorded), configuration.plain(wanted))


def _made_otherwise(folder: Path) -> list[str]:
    """What of code and data has changed since a run's checkpoint, which ``gankit resume`` therefore refuses."""
    from gankit.run import made_otherwise
    from gankit.rundir import RunDir

    with suppress(UsageError):  # of what is gone: the run itself will say so
        return made_otherwise(RunDir(folder))
    return []


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals that ask for it (:mod:`gankit.process`) end the block with Interrupted."""

    def handle(number: int, frame: Any) -> None:
        raise Interrupted

    threaded = threading.current_thread() is not threading.main_thread()
    before = {} if threaded else {n: signal.signal(n, handle) for n in signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
