"""The command line. Heavy imports happen inside the commands: ``gankit --help`` and ``gankit plugins`` need no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from gankit import __version__
from gankit.config import RECIPES, Config, Device, Options, make, read_toml
from gankit.errors import Diverged, Lost, UsageError
from gankit.options import Option, closest, options_of, type_name
from gankit.plugins import available, distribution_of, find
from gankit.scaffold import KINDS, LICENSES, render, write

if TYPE_CHECKING:
    from rich.console import Console

SECTIONS = {
    "data": ("data", "data_root", "image_size"),
    "method": ("plugin", "allow", "loss"),
    "networks": ("network", "generator", "discriminator", "width", "depth", "z_dim", "z", "ema"),
    "training": (
        "steps", "batch", "lr_g", "lr_d", "beta1", "beta2", "d_steps", "simultaneous", "decay_from", "decay_to", "seed",
        "device", "threads",
    ),
    "record": ("out", "name", "log_every", "eval_every", "save_every", "eval_samples", "keep"),
}  # fmt: skip


def joined() -> AbstractContextManager[None]:
    """:func:`gankit.distributed.joined`, for which torch is imported only where there are processes to join."""
    if "RANK" not in os.environ:
        return nullcontext()
    from gankit import distributed

    return distributed.joined()


class Failure(click.ClickException):
    """One sentence on the error stream, and exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the sentence."""
        click.echo(f"gankit: {self.format_message()}", file=file or sys.stderr)


class Stopped(Failure):
    """Training had to stop: exit code 1."""

    exit_code = 1


class Commands(click.Group):
    """Turns the errors a user can do something about into one sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, among torchrun's processes if there are any; everything unexpected keeps its traceback."""
        try:
            with joined() if ctx.parent is None else nullcontext(), warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
                return super().invoke(ctx)
        except UsageError as error:
            raise Failure(str(error)) from error
        except BrokenPipeError:  # of `| head`, which click ends without a word
            raise
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            raise Failure(f"cannot read or write {what}{error.strerror or error}") from error
        except (Diverged, Lost) as error:
            raise Stopped(str(error)) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the closest command for a misspelt one."""
        name = click.utils.make_str(args[0])
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise Failure(f"no command {name!r}{closest(name, self.commands)}; there are {', '.join(self.commands)}")
        return super().resolve_command(ctx, args)


class SectionedCommand(click.Command):
    """A command whose help groups its options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one block of options per section, then the rest."""
        records = {p.name: p.get_help_record(ctx) for p in self.get_params(ctx)}
        for section, names in SECTIONS.items():
            rows = [records.pop(name) for name in names if name in records]
            with formatter.section(section):
                formatter.write_dl([row for row in rows if row])
        with formatter.section("other"):
            formatter.write_dl([row for row in records.values() if row])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="gankit")
def main() -> None:
    """Train GANs with regularizers that are proven right and combine.

    \b
    gankit run --plugin pairwise_gp           train on the ring of eight Gaussians, see what happened
    gankit run --data ./photos --steps 5000   train on your own images
    gankit plugins                            what is installed
    """


def _flag(option: Option) -> Callable[[Any], Any]:
    """The flag of one field of the configuration: metavar by type, help with the default or the recipes' values."""
    names = [f"--{option.name.replace('_', '-')}", option.name, *(["-p"] if option.name == "plugin" else [])]
    short = {"whole number": "N", "number": "X", "text": "TEXT", "whole number or auto": "N|auto"}
    metavar = type_name(option.annotation).removesuffix(" or none").replace("_", "-")
    by_kind = [f"{kind} {recipe[option.name]}" for kind, recipe in RECIPES.items() if option.name in recipe]
    default = ", ".join(by_kind) or option.default
    if option.annotation is bool:
        return click.option(*names, is_flag=True, default=None, help=option.help)
    return click.option(
        *names,
        metavar="NAME" if option.name in ("plugin", "allow", "loss") else short.get(metavar, metavar),
        multiple=option.name in ("plugin", "allow"),
        help=option.help + (f"  [{default}]" if default not in (None, (), {}) else "").replace("_", "-"),
    )


OPTION_HELP = "set an option of a plugin, or of the loss (loss.a=-1)"
SET_HELP = "set anything by its name in the TOML file: steps=100, gradient_penalty.weight=5"
CONFIG_HELP = "read settings from a file; flags win over it"


def settings(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one flag per field of :class:`Config`, and the ways to set many at once."""
    for option in reversed([option for option in options_of(Config).values() if option.name != "options"]):
        command = _flag(option)(command)
    extra = [
        click.option("-o", "option", multiple=True, metavar="PLUGIN.OPTION=VALUE", help=OPTION_HELP),
        click.option("--set", "set_", multiple=True, metavar="KEY=VALUE", help=SET_HELP),
        click.option("--config", "config_file", metavar="FILE.toml", help=CONFIG_HELP),
    ]
    for decorator in extra:
        command = decorator(command)
    return command


def read_settings(given: Mapping[str, Any]) -> Config:
    """The configuration of a command line: the file, then ``--set``, then flags and ``-o``."""
    given = dict(given)
    file, sets, chosen = given.pop("config_file"), given.pop("set_"), given.pop("option")
    values, options = read_toml(Path(file)) if file else ({}, {})
    for text in sets:
        key, value = _split(text, "--set")
        if "." in key:
            chosen = (*chosen, text)
        else:
            values[key.replace("-", "_")] = value
    values |= {key: value for key, value in given.items() if value not in (None, ())}
    return make(values, read_options(chosen, options))


def read_options(chosen: Iterable[str], options: Options) -> Options:
    """Add each ``plugin.option=value`` to the options, and return them."""
    for text in chosen:
        key, value = _split(text, "-o")
        plugin, dot, name = key.rpartition(".")
        if not dot:
            raise UsageError(f"-o takes plugin.option=value, not {text!r}")
        options.setdefault(plugin, {})[name.replace("-", "_")] = value
    return options


def _split(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{flag} takes name=value, not {text!r}")
    return key.strip(), value.strip()


def _console(as_json: bool) -> Console:
    from rich.console import Console

    return Console(stderr=as_json)


def _finish(result: Any, as_json: bool, console: Console, reported: bool) -> None:
    from gankit import pictures, report
    from gankit.distributed import team
    from gankit.run import curve_groups
    from gankit.rundir import to_json
    from gankit.terminal import show_result

    if reported and team().rank == 0:
        with suppress(UsageError):  # the libraries of both are extras
            pictures.curves(curve_groups(result.run), result.run.path / "curves.png")
        with suppress(UsageError):
            report.write([result.run], result.run.path / "report.html")
    show_result(console, result, reported)
    if as_json:
        click.echo(to_json(result.plain()), nl=False)
    if result.signal:
        sys.exit(128 + result.signal)


json_flag = click.option("--json", "as_json", is_flag=True, help="print the result as JSON; all else goes to stderr")
report_flag = click.option(
    "--report/--no-report", "reported", default=True, help="end with curves.png and report.html  [report]"
)
device_flag = click.option(
    "--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="where to compute"
)
checkpoint_flag = click.option("--checkpoint", metavar="WHICH", help="best, latest or a step  [best]")


@main.command(cls=SectionedCommand)
@settings
@click.option("--dry-run", is_flag=True, help="do everything but train: read the data, build, refuse")
@report_flag
@json_flag
def run(dry_run: bool, reported: bool, as_json: bool, **given: Any) -> None:
    """Train a GAN; end with a picture and a table.

    \b
    gankit run --plugin pairwise_gp
    gankit run --data mnist --plugin gradient_penalty --loss wasserstein -o gradient_penalty.weight=5
    gankit run --config mine.toml --steps 500 --seed 3
    """
    config = read_settings(given)
    from gankit import run as running
    from gankit.config import to_toml
    from gankit.rundir import to_json
    from gankit.terminal import Terminal, networks_line

    console = _console(as_json)
    terminal = Terminal(console)
    if dry_run:
        session = running.dry_run(config, terminal)
        console.print(networks_line(session.gan), highlight=False, markup=False, soft_wrap=True)
        if as_json:
            click.echo(to_json(dataclasses.asdict(session.config)), nl=False)
        else:
            console.print(to_toml(session.config), highlight=False, markup=False)
        return
    result = running.start(config, terminal)
    _finish(result, as_json, console, reported)


@main.command()
@click.argument("run", required=False)
@click.option("--out", default="runs", help="folder that collects runs  [runs]")
@click.option("--steps", type=click.IntRange(1), help="train on to this many steps in all")
@report_flag
@json_flag
def resume(run: str | None, out: str, steps: int | None, reported: bool, as_json: bool) -> None:
    """Continue a run from its latest checkpoint, as if it had never stopped.

    RUN is a run's folder, name or number; without it the newest run is taken.
    """
    from gankit import run as running
    from gankit.distributed import team
    from gankit.rundir import RunDir
    from gankit.terminal import Terminal

    console = _console(as_json)
    found = team().led(lambda: RunDir.find(run, out))
    result = running.resume(found, Terminal(console), steps)
    _finish(result, as_json, console, reported)


@main.command()
@click.argument("run", required=False)
@click.option("--out", default="runs", help="folder that collects runs  [runs]")
@click.option("-n", "n", default=64, type=click.IntRange(1), show_default=True, help="how many")
@click.option("--to", "to", metavar="FILE", help=".png, .npy, .npz or .csv  [RUN/samples.png]")
@click.option("--seed", default=0, show_default=True, help="of the latents")
@checkpoint_flag
@device_flag
def sample(
    run: str | None, out: str, n: int, to: str | None, seed: int, checkpoint: str | None, device: Device
) -> None:
    """Draw samples from a run's generator (the averaged one, where there is one) into a picture or an array."""
    from gankit import run as running
    from gankit.rundir import RunDir

    path = running.sample(RunDir.find(run, out), n, to, seed, checkpoint, device)
    click.echo(f"{n} samples: {path}")


@main.command()
@click.argument("run", required=False)
@click.option("--out", default="runs", help="folder that collects runs  [runs]")
@click.option("--to", metavar="FILE.png", help="where to  [RUN/interpolation.png]")
@click.option("--rows", default=8, type=click.IntRange(1), show_default=True, help="pairs of latents")
@click.option("--columns", type=click.IntRange(2), help="latents from one to the other  [10 images or 200 points]")
@click.option("--seed", default=0, show_default=True, help="of the latents")
@checkpoint_flag
@device_flag
def interpolate(
    run: str | None,
    out: str,
    to: str | None,
    rows: int,
    columns: int | None,
    seed: int,
    checkpoint: str | None,
    device: Device,
) -> None:
    """Draw what a run's generator makes on the way from one latent to another: rows of images, or paths of points."""
    from gankit import inversion
    from gankit.rundir import RunDir
    from gankit.terminal import Terminal

    found, terminal = RunDir.find(run, out), Terminal(_console(True))
    path = inversion.interpolate(found, terminal, to, rows, columns, seed, checkpoint, device)
    click.echo(f"picture: {path}")


@main.command()
@click.argument("run", required=False)
@click.option("--out", default="runs", help="folder that collects runs  [runs]")
@click.option("-n", "n", default=64, type=click.IntRange(1), show_default=True, help="held-out samples")
@click.option("--steps", default=200, type=click.IntRange(1), show_default=True, help="Adam steps from each start")
@click.option("--restarts", default=3, type=click.IntRange(1), show_default=True, help="starts for each sample")
@click.option("--seed", default=0, show_default=True, help="of the starts")
@click.option("--to", metavar="FILE.png", help="where to  [RUN/inversion.png]")
@checkpoint_flag
@device_flag
@json_flag
def invert(
    run: str | None,
    out: str,
    n: int,
    steps: int,
    restarts: int,
    seed: int,
    to: str | None,
    checkpoint: str | None,
    device: Device,
    as_json: bool,
) -> None:
    """Look for the latents of held-out samples (IvOM): how near can a run's generator come to true data?

    Also the error of G(E(x)), where the run has an encoder; and a picture, what is missed most first.
    """
    from gankit import inversion
    from gankit.rundir import RunDir, to_json
    from gankit.terminal import Terminal, label, shown

    console = _console(as_json)
    found = RunDir.find(run, out)
    result = inversion.invert(found, Terminal(console), n, steps, restarts, seed, to, checkpoint, device)
    lines = [f"{found.path}, step {result.step}; mean squares per pixel or coordinate"]
    lines += [f"{label(name)}: {shown(name, value)}" for name, value in result.metrics.items()]
    lines += [f"worst IvOM of a sample: {result.worst:.5f}", f"variance of the data: {result.variance:.5f}"]
    for line in [*lines, f"picture: {result.picture}"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if as_json:
        click.echo(to_json({"run": str(found.path), **vars(result), "picture": str(result.picture)}), nl=False)


@main.command()
@click.argument("run", nargs=-1)
@click.option("--out", default="runs", help="folder that collects runs  [runs]")
@click.option("--to", metavar="FILE.html", help="where to  [RUN/report.html, of several runs report.html]")
@click.option("--open", "open_", is_flag=True, help="show it in the browser")
def report(run: tuple[str, ...], out: str, to: str | None, open_: bool) -> None:
    """Write one HTML page of a run, or of several side by side: samples over training, curves, losses, costs, settings.

    RUN is a run's folder, name or number, or a folder of runs, such as a benchmark's; without it the newest run is taken.
    The page needs no network and no other file.
    """
    from gankit import report as reporting
    from gankit.terminal import Terminal

    started, terminal = time.perf_counter(), Terminal(_console(True))

    def progress(done: int, total: int, what: str) -> None:
        if time.perf_counter() - started > 2:
            terminal.loading(done, total, what)

    runs, note = reporting.find(run, out)
    path = Path(to) if to else runs[0].path / "report.html" if len(runs) == 1 else Path("report.html")
    if path.suffix not in (".html", ".htm"):
        raise UsageError(f"a report goes to an .html file, not {path.name!r}")
    reporting.write(runs, path, note, progress, reporting.benchmarks(run))
    click.echo(f"report: {path}")
    if note:
        click.echo(note, err=True)
    if open_:
        click.launch(str(path))


@main.command()
@click.argument("run", required=False)
@click.option("--out", default="runs", help="folder that collects runs  [runs]")
@click.option("--to", metavar="FOLDER", help="where to  [RUN/export]")
@checkpoint_flag
def export(run: str | None, out: str, to: str | None, checkpoint: str | None) -> None:
    """Write a run's networks as plain safetensors, one file each; spectral norm and the like are folded in."""
    from gankit import run as running
    from gankit.rundir import RunDir

    for path in running.export(RunDir.find(run, out), to, checkpoint):
        click.echo(path)


@main.command()
@click.argument("run", required=False)
@click.option("--out", default="runs", help="folder that collects runs  [runs]")
@click.option("-n", "n", type=click.IntRange(2), help="generated samples  [as in the run]")
@click.option("--plugin", "-p", multiple=True, metavar="NAME", help="add a plugin that measures, such as inception")
@click.option("-o", "option", multiple=True, metavar="PLUGIN.OPTION=VALUE", help="set an option of such a plugin")
@checkpoint_flag
@device_flag
@json_flag
def evaluate(
    run: str | None,
    out: str,
    n: int | None,
    plugin: tuple[str, ...],
    option: tuple[str, ...],
    checkpoint: str | None,
    device: Device,
    as_json: bool,
) -> None:
    """Compute the metrics of a run again, beside those of the true data; with --plugin, further ones."""
    from gankit import run as running
    from gankit.rundir import RunDir, to_json
    from gankit.terminal import Terminal, metrics_table

    console = _console(as_json)
    found = RunDir.find(run, out)
    options = read_options(option, {})
    step, metrics, truth, provenance = running.evaluate(
        found, Terminal(console), checkpoint, device, n, plugin, options
    )
    console.print(f"{found.path}, step {step}", highlight=False, markup=False, soft_wrap=True)
    console.print(metrics_table(metrics, truth))
    if as_json:
        values = {"metrics": metrics, "truth": truth, "provenance": provenance}
        click.echo(to_json({"run": str(found.path), "step": step, **values}), nl=False)


@main.command()
@click.argument("run", required=False)
@click.option("--out", default="runs", help="folder that collects runs  [runs]")
@json_flag
def diagnose(run: str | None, out: str, as_json: bool) -> None:
    """Say what is wrong with a run, how sure that is, and what to try, the best first.

    By what the run logged; it may be running, or have been stopped. Findings are no error: the exit code is 0.
    """
    from gankit import diagnose as diagnosing
    from gankit.rundir import RunDir, to_json
    from gankit.terminal import show_diagnosis

    found = RunDir.find(run, out)
    diagnosis = diagnosing.diagnose(diagnosing.Record.read(found))
    show_diagnosis(_console(as_json), found.path, diagnosis)
    if as_json:
        click.echo(to_json({"run": str(found.path), **diagnosis.plain()}), nl=False)


@main.command(cls=SectionedCommand)
@settings
def explain(**given: Any) -> None:
    """Show which hooks and plugins act in which order for a command, without training.

    Takes the same flags as `gankit run`.
    """
    config = read_settings(given)
    from gankit import run as running
    from gankit.terminal import Terminal, show_order

    console = _console(False)
    show_order(console, running.dry_run(config, Terminal(console)))


@main.command()
@click.argument("suite", nargs=-1)
@click.option("--seeds", metavar="N|FROM-TO", help="how many seeds, or from which to which  [the suite's]")
@click.option("--steps", type=click.IntRange(1), help="another length of training; the tables say so  [the suite's]")
@click.option("--method", "methods", multiple=True, metavar="NAME", help="only this method; repeatable")
@click.option("--data", "data", multiple=True, metavar="NAME", help="only this data set; repeatable")
@click.option("--out", default="benches", show_default=True, help="folder that collects suites")
@click.option("--jobs", default="auto", metavar="N|auto", help="runs at a time; auto: as many as there are cores for")
@click.option(
    "--engine",
    default="processes",
    show_default=True,
    type=click.Choice(["processes", "ray"]),
    help="on this machine, or as Ray tasks",
)
@click.option("--retry", is_flag=True, help="train again what failed")
@click.option("--dry-run", is_flag=True, help="only list the runs and what there is of them")
@json_flag
def bench(
    suite: tuple[str, ...],
    seeds: str | None,
    steps: int | None,
    methods: tuple[str, ...],
    data: tuple[str, ...],
    out: str,
    jobs: str,
    engine: str,
    retry: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compare methods over seeds: run a SUITE, end with tables. Without SUITE: list those that come with gankit.

    \b
    gankit bench quick                      all toy sets, about six minutes on two cores
    gankit bench ring --method r1 --seeds 3
    gankit bench ring --seeds 5-9           the second half, here or on another machine
    gankit bench mine.toml --engine ray     data sets x methods x seeds of your own, on a cluster

    Every run is an ordinary one below OUT/SUITE/runs. The same command continues what was interrupted; a run that
    fails is a row with its reason.
    """  # fmt: skip
    from gankit import bench as benching

    if not suite:
        _list_suites(as_json)
        return
    if jobs != "auto" and not (jobs.isdecimal() and int(jobs)):
        raise UsageError(f"--jobs takes a whole number from 1 on, or auto, not {jobs!r}")
    wanted = None if seeds is None else _seeds(seeds)
    chosen = [
        benching.narrowed(benching.read(name), seeds=wanted, methods=methods, data=data, steps=steps) for name in suite
    ]
    if dry_run:
        listed = [
            {"suite": one.name, "run": cell.name, "state": benching.state_of(Path(out) / one.name / "runs" / cell.name)}
            for one in chosen
            for cell in one.cells()
        ]
        click.echo(json.dumps(listed, indent=2) if as_json else "\n".join("  ".join(row.values()) for row in listed))
        return
    from gankit import results
    from gankit.rundir import to_json
    from gankit.terminal import BenchProgress, Terminal, show_bench

    console, found = _console(as_json), []
    for one in chosen:
        folder = Path(out) / one.name
        with BenchProgress(console, one.name) as progress:
            try:
                benching.execute(
                    one, folder, jobs=None if jobs == "auto" else int(jobs), engine=engine, retry=retry, report=progress
                )
            except benching.Interrupted:
                kept = "all runs have saved" if engine == "processes" else "what had ended is kept"
                raise Stopped(f"stopped; {kept}, and the same command continues: {folder}") from None
        rows = results.write(one, folder, Terminal(console))
        found.append(results.plain(one, rows))
        show_bench(console, one, rows, folder)
    if as_json:
        click.echo(to_json(found), nl=False)


def _seeds(text: str) -> range:
    """The seeds that --seeds names: "3" are 0, 1 and 2, and "5-9" all from 5 to 9."""
    first, dash, last = text.rpartition("-")
    seeds = range(0)
    with suppress(ValueError):
        seeds = range(int(first), int(last) + 1) if dash else range(int(last))
    if not seeds:
        raise UsageError(f"--seeds takes how many, such as 3, or from which to which, such as 5-9, not {text!r}")
    return seeds


def _list_suites(as_json: bool) -> None:
    from gankit import bench as benching

    suites = {name: benching.read(name) for name in benching.shipped()}
    if as_json:
        listed = [{"name": name, "title": s.title, "protocol": s.protocol} for name, s in suites.items()]
        click.echo(json.dumps(listed, indent=2))
        return
    width = max(map(len, suites))
    for name, one in suites.items():
        runs = len(one.cells())
        click.echo(f"{name:<{width}}  {one.title}; {one.protocol}; {len(one.methods)} methods, {runs} runs")


@main.group(invoke_without_command=True, cls=Commands)
@click.option("--json", "as_json", is_flag=True, help="print the list as JSON")
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """List the installed plugins; `gankit plugins show NAME` tells all about one."""
    if ctx.invoked_subcommand:
        return
    rows = []
    for name, entry_point in available().items():
        distribution, version = distribution_of(entry_point)
        summary = metadata(distribution)["Summary"] if entry_point.dist else ""
        rows.append({"name": name, "version": version, "distribution": distribution, "summary": summary})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo("no plugins are installed; in a checkout of gankit: pip install ./plugins/pairwise_gp")
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        click.echo(f"{row['name']:<{width}}  {row['version']:<8} {row['summary']}")


@plugins.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="print it as JSON")
def show(name: str, as_json: bool) -> None:
    """Options with types and defaults, formula and paper of one plugin (a name, file.py:Class or module:Class)."""
    from rich.table import Table

    source = find(name)
    factory = source.factory
    options = options_of(factory)
    facts = {
        "name": source.name,
        "distribution": source.distribution,
        "version": source.version,
        "summary": (factory.__doc__ or "").strip().split("\n")[0],
        "formula": getattr(factory, "formula", ""),
        "paper": getattr(factory, "paper", ""),
        "options": {
            key: {"type": type_name(o.annotation), "default": _default(o), "help": o.help} for key, o in options.items()
        },
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    console = _console(False)
    console.print(f"[bold]{source.name}[/]  {source.distribution} {source.version}", highlight=False)
    for key in ("summary", "formula", "paper"):
        if facts[key]:
            console.print(f"{'' if key == 'summary' else key + ': '}{facts[key]}", highlight=False, markup=False)
    table = Table("option", "type", "default", "", box=None, header_style="bold", pad_edge=False)
    for key, option in options.items():
        table.add_row(f"{source.name}.{key}", type_name(option.annotation), str(_default(option)), option.help)
    console.print()
    console.print(table if options else "no options")


@main.command()
@click.argument("target")
@click.option("-o", "option", multiple=True, metavar="[PLUGIN.]OPTION=VALUE", help="set an option in all checks")
@click.option("--only", multiple=True, metavar="CHECK", help="run this check alone; may be given several times")
@click.option("--json", "as_json", is_flag=True, help="print a list of {check, status, what, mend}, and no lines")
def check(target: str, option: tuple[str, ...], only: tuple[str, ...], as_json: bool) -> None:
    """Hold a plugin to what every plugin has to hold to, and to its claims. Exit code 0, or 1 if a check fails.

    TARGET is an installed plugin's name, file.py:Class or module:Class. Each check trains the plugin for a few steps in
    small GANs on the CPU, and says in one line what is wrong, where, and how to mend it.

    \b
    gankit check r1
    gankit check ./mine.py:MyPenalty -o weight=0.5
    gankit check r1 --only derivative --only resumes
    """
    name = find(target).name  # a target that cannot be found is told without waiting for torch
    given = dict(_split(text.removeprefix(f"{name}."), "-o") for text in option)
    from gankit.conformance import checks_of

    results = []
    for one in checks_of(target, given, only):
        if not as_json and sys.stdout.isatty():
            click.echo(f"...     {one}\r", nl=False)
        results.append(one.result())
        if not as_json:
            click.echo(results[-1])
    counts = {status: sum(result.status == status for result in results) for status in ("ok", "failed", "skipped")}
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    else:
        click.echo(f"{target}: {counts['ok']} ok, {counts['failed']} failed, {counts['skipped']} skipped")
    sys.exit(1 if counts["failed"] else 0)


@main.command("new-plugin")
@click.argument("name")
@click.option("--kind", type=click.Choice([*KINDS]), default="d-term", show_default=True, help="what it starts from")
@click.option("--to", metavar="FOLDER", help="where to  [gankit-NAME]")
@click.option("--license", type=click.Choice(LICENSES), default="MIT", show_default=True, help="whose text is written")
@click.option("--author", default="", help="for the license and pyproject.toml")
def new_plugin(name: str, kind: str, to: str | None, license: str, author: str) -> None:
    """Write a plugin as a project of its own: module, tests, README, CI, license.

    It works as it is written; replace its formula by yours, and what says TODO.
    """
    project = render(name, kind, license=license, author=author)
    folder = Path(to) if to else Path(f"gankit-{name.replace('_', '-')}")
    for path in write(project, folder):
        click.echo(path)
    module = next(path for path in project if path.startswith("gankit_"))
    click.echo(f'\nnext: pip install -e "{folder}[test]", then python -m pytest {folder} and edit {module}')


def _default(option: Option) -> Any:
    return "(required)" if option.default is dataclasses.MISSING else option.default


if __name__ == "__main__":
    main()
