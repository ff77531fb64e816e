"""The command line. Heavy imports happen inside the commands: ``gankit --help`` and ``gankit plugins`` need no torch."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from gankit import __version__
from gankit.config import RECIPES, Config, Device, make, read_toml
from gankit.errors import Diverged, UsageError
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
        "steps", "batch", "lr_g", "lr_d", "beta1", "beta2", "d_steps", "decay_from", "decay_to", "seed", "device", "threads",
    ),
    "record": ("out", "name", "log_every", "eval_every", "save_every", "eval_samples", "keep"),
}  # fmt: skip


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
        """Run the command; everything unexpected keeps its traceback."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
                return super().invoke(ctx)
        except UsageError as error:
            raise Failure(str(error)) from error
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            raise Failure(f"cannot read or write {what}{error.strerror or error}") from error
        except Diverged as error:
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
    for text in chosen:
        key, value = _split(text, "-o")
        plugin, dot, name = key.rpartition(".")
        if not dot:
            raise UsageError(f"-o takes plugin.option=value, not {text!r}")
        options.setdefault(plugin, {})[name.replace("-", "_")] = value
    return make(values, options)


def _split(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{flag} takes name=value, not {text!r}")
    return key.strip(), value.strip()


def _console(as_json: bool) -> Console:
    from rich.console import Console

    return Console(stderr=as_json)


def _finish(result: Any, as_json: bool, console: Console, plugins: Any) -> None:
    from gankit.rundir import to_json
    from gankit.terminal import show_result

    show_result(console, result, plugins)
    if as_json:
        click.echo(to_json(result.plain()), nl=False)
    if result.signal:
        sys.exit(128 + result.signal)


json_flag = click.option("--json", "as_json", is_flag=True, help="print the result as JSON; all else goes to stderr")
device_flag = click.option(
    "--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="where to compute"
)
checkpoint_flag = click.option("--checkpoint", metavar="WHICH", help="best, latest or a step  [best]")


@main.command(cls=SectionedCommand)
@settings
@click.option("--dry-run", is_flag=True, help="do everything but train: read the data, build, refuse")
@json_flag
def run(dry_run: bool, as_json: bool, **given: Any) -> None:
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
    _finish(result, as_json, console, result.plugins)


@main.command()
@click.argument("run", required=False)
@click.option("--out", default="runs", help="folder that collects runs  [runs]")
@click.option("--steps", type=click.IntRange(1), help="train on to this many steps in all")
@json_flag
def resume(run: str | None, out: str, steps: int | None, as_json: bool) -> None:
    """Continue a run from its latest checkpoint, as if it had never stopped.

    RUN is a run's folder, name or number; without it the newest run is taken.
    """
    from gankit import run as running
    from gankit.rundir import RunDir
    from gankit.terminal import Terminal

    console = _console(as_json)
    result = running.resume(RunDir.find(run, out), Terminal(console), steps)
    _finish(result, as_json, console, result.plugins)


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
@checkpoint_flag
@device_flag
@json_flag
def evaluate(run: str | None, out: str, n: int | None, checkpoint: str | None, device: Device, as_json: bool) -> None:
    """Compute the metrics of a run again, beside those of the true data."""
    from gankit import run as running
    from gankit.rundir import RunDir, to_json
    from gankit.terminal import Terminal, metrics_table

    console = _console(as_json)
    found = RunDir.find(run, out)
    step, metrics, truth, provenance = running.evaluate(found, Terminal(console), checkpoint, device, n)
    console.print(f"{found.path}, step {step}", highlight=False, markup=False, soft_wrap=True)
    console.print(metrics_table(metrics, truth))
    if as_json:
        values = {"metrics": metrics, "truth": truth, "provenance": provenance}
        click.echo(to_json({"run": str(found.path), "step": step, **values}), nl=False)


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
        click.echo("no plugins are installed; for example: pip install gankit-pairwise-gp")
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
