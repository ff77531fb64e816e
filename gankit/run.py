"""From a configuration to a finished run, and back from a run's folder to its networks."""

from __future__ import annotations

import io
import platform
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from torch.utils.flop_counter import FlopCounterMode

from gankit import __version__, losses, networks, pictures, plane
from gankit import config as configuration
from gankit import data as datasets
from gankit.config import Config, Device
from gankit.data import Dataset
from gankit.diagnose import Finding, Record, Watch, diagnose
from gankit.distributed import Together, team
from gankit.errors import Diverged, UsageError
from gankit.files import FAILED, expanded, held, step_of, write_atomic
from gankit.gan import GAN, Latent, Optim, derive_seed
from gankit.loop import train
from gankit.plugins import Source, available, create, find, load_object, version_of
from gankit.process import cores, signals
from gankit.rundir import Elsewhere, RunDir
from gankit.sampler import Sampler
from gankit.signals import Signals
from gankit.training import (
    Averaging,
    Evaluator,
    LinearDecay,
    Metrics,
    Saver,
    Stats,
    measure,
    record_provenance,
)

# Multiply-adds of one forward pass of G and D above which a second thread pays: tests/benchmarks/threads.py.
WORTH_THREADS = 50e6


class Reporter(Protocol):
    """Who tells the person what happens. It is registered beside the plugins, so it may implement hooks, too."""

    def loading(self, done: int, total: int, what: str = "reading") -> None:
        """Something takes time, such as reading data: ``done`` of ``total`` parts."""

    def data(self, summary: datasets.Summary) -> None:
        """The data were read."""

    def start(self, gan: GAN, run: RunDir, steps: int) -> None:
        """Training begins, or goes on at ``gan.step``."""

    def metrics(self, step: int, found: Mapping[str, float]) -> None:
        """An evaluation ended."""

    def finding(self, finding: Finding) -> None:
        """Something seems to be wrong; said once for each finding."""

    def stop(self) -> None:
        """Training ended."""


@dataclass
class Result:
    """How a run ended: ``status`` is "finished" or "interrupted" (then ``signal`` says by what)."""

    run: RunDir
    status: str
    step: int
    steps: int
    metrics: dict[str, float]
    truth: dict[str, float]
    stats: dict[str, Any]
    seconds: float
    plugins: list[str]
    signal: int | None = None
    findings: tuple[Finding, ...] = ()

    def plain(self) -> dict[str, Any]:
        """The result in plain containers, for JSON."""
        return {**vars(self), "run": str(self.run.path), "findings": [finding.plain() for finding in self.findings]}


# -- networks ------------------------------------------------------------------------------------------------------


def choose_device(wanted: str) -> torch.device:
    """The device called ``wanted``; "auto" is cuda if there is one. UsageError if it is missing."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("no CUDA device is available to this torch: use --device cpu")
    return torch.device(wanted)


def choose_threads(gan: GAN) -> int:
    """CPU threads for a built GAN: by the work of one forward pass, so that every run of it gets the same bits."""
    gan.discriminator.eval()  # so that nothing moves: batch-norm statistics, power iterations
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        gan.discriminator(*gan.first_view().real)
    gan.discriminator.train()
    many = counter.get_total_flops() / 2 > WORTH_THREADS
    return max(1, min(cores() // gan.team.here, 8)) if many else 1


def code_of(spec: str) -> str:
    """The state of the file that ``spec`` names, which is loaded already; of gankit's own networks, their version."""
    where = spec.rpartition(":")[0]
    if where.startswith("gankit."):
        return __version__
    file = where if where.endswith(".py") else sys.modules[where].__file__
    return version_of(expanded(file) if file else None)


def networks_of(config: Config) -> dict[str, str]:
    """The state of the code of the run's own networks, as :func:`code_of` has it."""
    return {spec: code_of(spec) for spec in (config.generator, config.discriminator) if spec}


def facts_of(sources: Sequence[Source]) -> dict[str, dict[str, str]]:
    """Distribution and version of each plugin."""
    return {s.name: {"distribution": s.distribution, "version": s.version} for s in sources}


def assemble(config: Config, shape: tuple[int, ...], core: Mapping[str, object]) -> tuple[GAN, list[Source]]:
    """The GAN a resolved configuration asks for, on samples of ``shape``, not built yet; and its plugins' sources."""
    assert config.z_dim is not None and config.z is not None and config.batch is not None
    assert config.lr_g is not None and config.lr_d is not None
    assert config.beta1 is not None and config.beta2 is not None
    plugins, sources = create(config.plugin, {k: v for k, v in config.options.items() if k != "loss"})
    architecture: dict[str, Any] = {"network": config.network, "width": config.width, "depth": config.depth}

    betas = (config.beta1, config.beta2)
    gan = GAN(
        generator=load_object(config.generator)[0] if config.generator else None,
        discriminator=load_object(config.discriminator)[0] if config.discriminator else None,
        shape=shape,
        latent=Latent(config.z_dim, config.z),
        loss=losses.make(config.loss, **config.options.get("loss", {})),
        plugins=plugins,
        core=core,
        seed=config.seed,
        device=choose_device(config.device),
        optim={"d": Optim(config.lr_d, betas), "g": Optim(config.lr_g, betas)},
        batch_size=config.batch,
        d_steps=config.d_steps,
        simultaneous=config.simultaneous,
        architecture=architecture,
        allow=frozenset(config.allow),
    )
    gan.steps = config.steps
    return gan, sources


# -- training ------------------------------------------------------------------------------------------------------


class Session:
    """A built GAN with everything that trains and records it in one run's folder."""

    def __init__(self, config: Config, data: Dataset, run: RunDir, reporter: Reporter) -> None:
        """``config`` is resolved. Networks are built and refusals made; nothing is written.

        In a team process 0 alone writes to ``run``, evaluates, and has the others wait.
        """
        assert config.steps is not None and config.batch is not None and config.eval_samples is not None
        assert config.eval_every is not None and config.save_every is not None
        assert config.ema is not None and config.decay_from is not None and config.decay_to is not None
        device = choose_device(config.device)
        self.team = team()
        self.team.check(config.batch, device)
        run = run if self.team.rank == 0 else Elsewhere(run.path)
        self.run, self.reporter, self.steps = run, reporter, config.steps
        self.data = data.to(device)
        stream = torch.Generator(device).manual_seed(derive_seed(config.seed, "data"))
        sampler = Sampler(self.data, config.batch, stream, self.team)
        self.metrics = Metrics(self.data, config.eval_samples)
        self.stats = Stats(config.log_every, self.log)
        self.evaluator = Evaluator(run, self.data, config.eval_every, config.steps, self.stats, Watch(run, reporter))
        self.saver = Saver(run, self.evaluator, config.save_every, config.steps, config.keep, self.stats)
        self.decay = LinearDecay(config.decay_from, config.steps, config.decay_to)
        self.together = Together(self.team, self.evaluator)
        core = {
            "data": sampler,
            "averaging": Averaging(config.ema),
            "decay": self.decay,
            "stats": self.stats,
            "metrics": self.metrics,
            "signals": Signals(self.data, partial(run.append, "signals.jsonl")),
            "reporter": reporter,
            # these wrap all the others, and the first named is the last to act
            "saver": self.saver,
            **({"team": self.together} if self.team.size > 1 else {}),
            **({"evaluator": self.evaluator} if self.team.rank == 0 else {}),
        }
        self.gan, sources = assemble(config, data.shape, core)
        self.gan.next_real, self.gan.team = sampler, self.team
        self.gan.data, self.gan.progress, self.gan.folder = self.data, reporter.loading, run.path
        self.gan.build()
        self.team.unite(self.gan)
        if device.type == "cuda":
            self.gan.manager.meter.clock = _cuda_clock
        threads = choose_threads(self.gan) if config.threads == "auto" else config.threads
        torch.set_num_threads(threads)
        self.config = replace(config, threads=threads, device="cuda" if device.type == "cuda" else "cpu")
        self.plugins = facts_of(sources)
        self.saver.facts = {
            "config": configuration.plain(self.config),
            "plugins": self.plugins,
            "networks": networks_of(config),
            "data": data.sketch(),
            "gankit": __version__,
            "processes": self.team.size,
        }

    def log(self, row: dict[str, Any]) -> None:
        """Write a line of stats.jsonl; in a team ``row`` becomes the mean of all processes' rows, but for the times."""
        if self.team.size > 1:
            row |= self.team.mean({k: v for k, v in row.items() if k != "step" and not k.startswith("ms/")})
        self.run.append("stats.jsonl", row)

    def record(self, summary: datasets.Summary) -> None:
        """Write what is known before the first step; for process 0."""
        run, data = self.run, self.data
        write_atomic(run.path / "config.toml", configuration.to_toml(self.config))
        run.write_json("plugins.json", self.plugins)
        own = {"processes": self.team.size, "networks": self.saver.facts["networks"]}
        run.write_json("env.json", {**environment(self.gan.device), **own})
        run.write_json("data.json", {**asdict(summary), "sketch": self.saver.facts["data"]})
        if data.is_image:
            pictures.save_png(pictures.image_grid(data.held_out(64).cpu(), 8), run.samples / "reals.png")
        elif data.shape == (2,):
            plane.save_reals(data.held_out(2500), run.samples / "reals.npz")
        run.append("metrics.jsonl", {"step": None, **measure(self.gan, truth=data)})
        record_provenance(self.gan, run)

    def restore(self) -> None:
        """Continue from the latest checkpoint; UsageError when settings, plugins or data are not what they were.

        Only the end may be another: a run is given more steps in its configuration, and may be killed before it saves again.
        """
        state, weights = self.team.led(self._checkpoint)
        self.gan.load_weights(weights)
        self.gan.load_state_dict(state)
        if state["facts"]["config"]["steps"] != self.steps:
            self.decay.set_rates(self.gan, self.gan.step)
        self.run.trim(self.gan.step)
        self.run.link_best(self.evaluator.at)
        self.saver.saved = self.gan.step

    def _checkpoint(self) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
        checkpoint = self.run.checkpoint("latest")
        state = self.run.load_state(checkpoint)
        if changed := _since(state["facts"], self.saver.facts):
            raise UsageError(
                f"{self.run.path} cannot be continued, because this has changed since its checkpoint: "
                f"{'; '.join(changed)}"
            )
        return state, self.run.load_weights(checkpoint, self.gan.weights())

    def train(self) -> Result:
        """Train to the end or to a signal, and record how it ended."""
        started = time.perf_counter()
        self.stats.started = started
        self.reporter.start(self.gan, self.run, self.steps)
        try:
            with stoppable(self.together if self.team.size > 1 else self.gan) as received:
                train(self.gan, self.steps)
                if self.saver.saved != self.gan.step:
                    self.saver.now(self.gan)
        except Diverged as error:
            self.run.append("signals.jsonl", {"step": self.gan.step, "diverged": str(error)})
            saved = self.run.checkpoints / f"step-{self.saver.saved:06d}"
            kept = f"the last good checkpoint is {saved}" if self.saver.saved else "nothing was saved yet"
            raise Diverged(
                f"{error}; {kept}; lower --lr-g and --lr-d, or a plugin's weight (gankit diagnose {self.run.path})"
            ) from error
        finally:
            self.reporter.stop()
        seconds = time.perf_counter() - started
        return self.team.led(partial(self._conclude, seconds, received[0] if received else None))

    def _conclude(self, seconds: float, signal: int | None) -> Result:
        """Record how training ended."""
        record = Record.read(self.run)
        truth, *evaluations = record.metrics
        before = self.run.read_json("summary.json")["seconds"] if (self.run.path / "summary.json").exists() else 0.0
        result = Result(
            run=self.run,
            status="finished" if self.gan.step >= self.steps else "interrupted",
            step=self.gan.step,
            steps=self.steps,
            metrics={k: v for k, v in evaluations[-1].items() if k != "step"} if evaluations else {},
            truth={k: v for k, v in truth.items() if k != "step"},
            stats=dict(record.stats[-1]) if record.stats else {},
            seconds=before + seconds,
            plugins=list(self.plugins),
            signal=signal,
            findings=diagnose(record).findings,
        )
        self.run.write_json("summary.json", result.plain())
        return result


def _since(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed since a checkpoint's facts, but for the end of the run."""
    older = {"processes": 1, **{name: now[name] for name in ("networks", "data")}}  # versions that did not record these
    changed = configuration.differences({**older, **was}, now)
    return [change for change in changed if not change.startswith("config.steps:")]


def made_otherwise(run: RunDir) -> list[str]:
    """What of code and data has changed since a run's last checkpoint, so that it cannot be continued."""
    config = recorded_config(run)
    was = run.load_state(run.checkpoint("latest"), mmap=True)["facts"]
    for spec in filter(None, (config.generator, config.discriminator)):
        load_object(spec)
    now = {
        "plugins": facts_of([find(spec) for spec in config.plugin]),
        "networks": networks_of(config),
        "data": datasets.load(config.data, data_root=config.data_root, image_size=config.image_size).sketch(),
        "gankit": __version__,
    }
    return _since(was, {**was, **now})


def curve_groups(run: RunDir) -> dict[str, list[dict[str, Any]]]:
    """What a run recorded, as groups of columns over the step, what matters most first."""
    groups = {"metrics": run.rows("metrics.jsonl")[1:]}
    for group, starts in [("losses", ("d_loss", "g_loss")), ("share of the gradient", ("gradient_share/",)),
                          ("rates and milliseconds", ("lr_", "ms/"))]:  # fmt: skip
        rows = run.rows("stats.jsonl")
        groups[group] = [{k: v for k, v in row.items() if k == "step" or k.startswith(starts)} for row in rows]
    return groups


def environment(device: torch.device) -> dict[str, Any]:
    """What else a result depends on: versions, machine, command."""
    packages = ("torch", "numpy", "scipy", "pluggy", "safetensors", "pillow")
    return {
        "gankit": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "arguments": sys.argv[1:],
    }


def _cuda_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def stoppable(stopping: GAN | Together) -> Iterator[list[int]]:
    """Signals that ask for it (:mod:`gankit.process`) end training after the running step. Yields those received.

    A second one aborts, but not in a team: there it comes by itself, from the terminal and from torchrun.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received and isinstance(stopping, GAN):
            raise KeyboardInterrupt
        received.append(number)
        stopping.stop = True

    before: dict[int, Any] = {}
    with suppress(ValueError):  # outside the main thread the caller looks after signals
        before = {number: signal.signal(number, handle) for number in signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_data(config: Config, reporter: Reporter) -> Dataset:
    """The data set a configuration names."""
    return datasets.load(
        config.data, data_root=config.data_root, image_size=config.image_size, progress=reporter.loading
    )


def start(config: Config, reporter: Reporter) -> Result:
    """``gankit run``: data, networks, folder, training."""
    data = read_data(config, reporter)
    config = configuration.resolve(config, data.shape)
    summary = datasets.summary(data)
    reporter.data(summary)
    label = "-".join(Path(name.rpartition(":")[2]).stem for name in (config.data, *config.plugin))
    members = team()
    run = members.led(partial(RunDir.create, Path(config.out), config.name, label))
    with held(run.path) if members.rank == 0 else nullcontext():
        try:
            session = Session(config, data, run, reporter)
            if members.rank == 0:
                session.record(summary)
            own = ("rank", str(members.rank)) if members.rank else ()
            torch.manual_seed(derive_seed(config.seed, *own, "global"))  # for a user's own layers, such as dropout
        except BaseException:
            if members.rank == 0:
                run.remove()
            raise
        return session.train()


def dry_run(config: Config, reporter: Reporter) -> Session:
    """Everything ``start`` does before it writes: data, networks, plugins, refusals."""
    data = read_data(config, reporter)
    config = configuration.resolve(config, data.shape)
    reporter.data(datasets.summary(data))
    return Session(config, data, RunDir(Path(config.out)), reporter)


# -- finished runs -------------------------------------------------------------------------------------------------


def recorded_config(run: RunDir) -> Config:
    """The configuration in a run's folder; UsageError if a plugin it was made with is not installed any more."""
    config = configuration.make(*configuration.read_toml(run.path / "config.toml"))
    facts = run.read_json("plugins.json") if (run.path / "plugins.json").exists() else {}
    for name in config.plugin:
        if name in facts and ":" not in name and name not in available():
            package = f"{facts[name]['distribution']} {facts[name]['version']}"
            raise UsageError(f"{run.path} was made with the plugin {name!r} ({package}), which is not installed")
    return config


def _unfinished(run: RunDir, steps: int | None) -> Config:
    config = recorded_config(run)
    ended = run.read_json("summary.json") if (run.path / "summary.json").exists() else None
    # one of fewer steps is of before it was continued, and killed
    if steps is None and ended and ended["status"] == "finished" and ended["steps"] >= config.steps:
        raise UsageError(f"{run.path} has finished its {config.steps} steps: give --steps to go on")
    reached = step_of(run.checkpoint("latest"))
    if steps is not None and steps < reached:
        raise UsageError(f"{run.path} is at step {reached:,} already: --steps takes the number of steps in all")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"{run.path} was trained on a GPU, and none is available to this torch: continue it where there is one; sample, "
            "evaluate and export work here, with --device cpu"
        )
    return replace(config, steps=steps or config.steps)


def resume(run: RunDir, reporter: Reporter, steps: int | None = None) -> Result:
    """``gankit resume``: continue from the latest checkpoint, bit for bit; ``steps`` sets a new end."""
    members = team()
    with held(run.path) if members.rank == 0 else nullcontext():
        config = members.led(partial(_unfinished, run, steps))
        session = Session(config, read_data(config, reporter), run, reporter)
        session.restore()
        if members.rank == 0:
            (run.path / FAILED).unlink(missing_ok=True)  # a benchmark's run that somebody continues
        if steps and members.rank == 0:
            write_atomic(run.path / "config.toml", configuration.to_toml(session.config))
        return session.train()


def load(
    run: RunDir,
    checkpoint: str | None = None,
    device: Device = "auto",
    measuring: Sequence[str] = (),
    options: configuration.Options | None = None,
) -> tuple[GAN, Config]:
    """The networks of a recorded run, without its data; ``checkpoint``: "best" (the default), "latest" or a step.

    measuring, options: plugins to add, and their options; UsageError for those that do more than measure. One that the run
    has already is there with the new options alone.
    """
    config = replace(recorded_config(run), device=device)
    added = {find(spec).name for spec in measuring}
    kept = tuple(spec for spec in config.plugin if find(spec).name not in added)
    known = {name: chosen for name, chosen in config.options.items() if name not in added}
    config = replace(config, plugin=(*kept, *measuring), options=known | (options or {}))
    assert config.ema is not None
    shape = tuple(run.read_json("data.json")["shape"])
    gan, sources = assemble(config, shape, {"averaging": Averaging(config.ema)})
    for source in sources[len(kept) :]:
        callers = gan.manager.get_hookcallers(gan.plugins[source.name]) or []
        hooks = sorted(caller.name for caller in callers)
        if not {"evaluate"} <= {*hooks} <= {"evaluate", "setup"}:
            raise UsageError(
                f"plugin {source.name!r} acts on training (by {', '.join(hooks)}), which is over: only plugins that "
                "measure can be added now"
            )
    gan.build()
    folder = run.checkpoint(checkpoint)
    facts = run.load_state(folder, mmap=True)["facts"]
    plugins = {name: about for name, about in facts_of(sources).items() if name in facts["plugins"]}
    now = {"networks": networks_of(config), "plugins": plugins}
    was = {"networks": facts.get("networks", now["networks"]), "plugins": {n: facts["plugins"][n] for n in plugins}}
    if changed := configuration.differences(was, now):
        warnings.warn(f"this has changed since {run.path} was trained: {'; '.join(changed)}", stacklevel=2)
    try:
        gan.load_weights(run.load_weights(folder, gan.weights()))
    except (RuntimeError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UsageError(f"the weights of {run.path} are not of these networks: {reason}") from None
    gan.step = int(folder.name.split("-")[1])
    return gan, config


def evaluate(
    run: RunDir,
    reporter: Reporter,
    checkpoint: str | None = None,
    device: Device = "auto",
    samples: int | None = None,
    measuring: Sequence[str] = (),
    options: configuration.Options | None = None,
) -> tuple[int, dict[str, float], dict[str, float], dict[str, dict[str, Any]]]:
    """Step and metrics of a recorded run's checkpoint, the true data's own on as many samples, and their provenance.

    measuring, options: further plugins, as for :func:`load`.
    """
    gan, config = load(run, checkpoint, device, measuring, options)
    gan.data, gan.progress = read_data(config, reporter).to(gan.device), reporter.loading
    assert config.eval_samples is not None
    gan.manager.register(Metrics(gan.data, samples or config.eval_samples), "metrics")
    return gan.step, measure(gan), measure(gan, truth=gan.data), gan.provenance


def export(run: RunDir, to: str | None = None, checkpoint: str | None = None) -> list[Path]:
    """Write each network of a recorded run as ``<to>/<network>.safetensors``, with ordinary weights, and list the files.

    What plugins keep beside a weight (the vectors of spectral norm) is folded in: the files load into the bare networks.
    """
    gan, _ = load(run, checkpoint, "cpu")
    folder = Path(to) if to else run.path / "export"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, module in gan.networks().items():
        tensors = {key: tensor.clone().contiguous() for key, tensor in networks.folded(module).state_dict().items()}
        written.append(folder / f"{name}.safetensors")
        write_atomic(written[-1], safetensors.torch.save(tensors))
    return written


def sample(
    run: RunDir,
    n: int,
    to: str | None = None,
    seed: int = 0,
    checkpoint: str | None = None,
    device: Device = "auto",
) -> Path:
    """Write n samples of a recorded run's generator to a .png, .npy, .npz or .csv file, and return its path."""
    path = Path(to) if to else run.path / "samples.png"
    if path.suffix not in (".png", ".npy", ".npz", ".csv"):
        raise UsageError(f"samples go to a .png, .npy, .npz or .csv file, not {path.name!r}")
    gan, _ = load(run, checkpoint, device)
    samples = gan.draw(n, torch.Generator(gan.device).manual_seed(derive_seed(seed, "sample"))).cpu()
    if path.suffix == ".png":
        is_image = samples.dim() == 4
        made = pictures.image_grid(samples) if is_image else pictures.scatter(None, samples)
        pictures.save_png(made, path)
        return path
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(buffer, x=samples.numpy())
    elif path.suffix == ".npy":
        np.save(buffer, samples.numpy())
    else:
        np.savetxt(buffer, samples.flatten(1).numpy(), delimiter=",", fmt="%.8g")
    write_atomic(path, buffer.getvalue())
    return path
