"""What a person sees while and after a run: rich output on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from gankit.hookspecs import hookimpl
from gankit.provenance import metric_of

if TYPE_CHECKING:
    from pathlib import Path

    from gankit.bench import Suite
    from gankit.data import Summary
    from gankit.diagnose import Diagnosis, Finding
    from gankit.gan import GAN
    from gankit.results import Row
    from gankit.run import Result, Session
    from gankit.rundir import RunDir
    from gankit.training import Stats

# A metric's name for people, and how its value is written.
METRICS: dict[str, tuple[str, str]] = {
    "modes": ("modes captured", "{:.0f}"),
    "high_quality": ("high quality", "{:.1%}"),
    "reverse_kl": ("reverse KL", "{:.4f}"),
    "jsd": ("Jensen-Shannon", "{:.4f}"),
    "kl_to_truth": ("KL to the true shares", "{:.4f}"),
    "worst_share_ratio": ("worst share, times off", "{:.2f}"),
    "rare_share": ("share of rare modes", "{:.1%}"),
    "sliced_wasserstein": ("sliced Wasserstein", "{:.4f}"),
    "energy_distance": ("energy distance", "{:.3g}"),
    "inception_score": ("Inception score", "{:.3f}"),
    "fid": ("FID", "{:.3f}"),
    "kid": ("KID", "{:.5f}"),
    "precision": ("precision", "{:.1%}"),
    "recall": ("recall", "{:.1%}"),
    "ivom": ("IvOM", "{:.5f}"),
    "reconstruction_error": ("reconstruction error", "{:.5f}"),
}
REFRESH = 0.25  # seconds between redraws of the bar: drawing competes with training for the interpreter
WIDE = 1000  # columns where there is no terminal: nothing of a table is cut
PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


def shown(name: str, value: float | None) -> str:
    """A metric's value as a person reads it."""
    return "-" if value is None else METRICS.get(metric_of(name), (name, "{:.4g}"))[1].format(value)


def label(name: str) -> str:
    """A metric's name as a person reads it, with its provenance."""
    metric, _, provenance = name.partition("@")
    text = METRICS.get(metric, (metric.replace("_", " "), ""))[0]
    return f"{text} ({provenance.replace(',', ', ')})" if provenance else text


class Terminal:
    """Progress of a run on a console; implements ``gankit.run.Reporter``."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.stats: Stats | None = None
        self.latest = self.path = ""
        self.steps = 0
        self.first = 0
        self.started = self.drawn = time.perf_counter()

    def loading(self, done: int, total: int, what: str = "reading") -> None:
        """Redraw one line of progress, or the text beside the bar."""
        now = time.perf_counter()
        if not self.console.is_terminal or (done != total and now - self.drawn < REFRESH):
            return
        self.drawn = now
        text = f"{what} {done}/{total}" if total else f"{what} {done}"  # 0: it is not known
        if self.bar:
            self.bar.update(self.task, text=text, refresh=True)
        else:
            self.console.print(text, end="\n" if done == total else "\r", highlight=False)

    def data(self, summary: Summary) -> None:
        """The summary of the data, with its warnings."""
        low, high = summary.value_range
        shape = "x".join(map(str, summary.shape))
        self.console.print(
            f"[bold]{escape(summary.name)}[/]: {summary.count:,} samples of {shape}, values {low:.4g} to {high:.4g}, "
            f"{summary.held_out:,} held out",
            highlight=False,
        )
        if summary.class_histogram:
            classes = list(summary.class_histogram.items())
            text = ", ".join(f"{name} {count:,}" for name, count in classes[:12])
            more = f", and {len(classes) - 12} more" if len(classes) > 12 else ""
            self.console.print(f"  classes: {escape(text)}{more}", highlight=False, soft_wrap=True)
        for warning in summary.warnings:
            self.console.print(f"  [yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)

    def start(self, gan: GAN, run: RunDir, steps: int) -> None:
        """Say what trains where, and show the bar."""
        self.stats = gan.manager.get_plugin("stats")
        self.steps, self.first, self.path = steps, gan.step, str(run.path)
        self.console.print(escape(networks_line(gan)), highlight=False, soft_wrap=True)
        self.console.print(f"run: [bold]{escape(str(run.path))}[/]", highlight=False, soft_wrap=True)
        self.started = self.drawn = time.perf_counter()
        if self.console.is_terminal:
            columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(
                *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
                console=self.console, auto_refresh=False, expand=True,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task("", total=steps, completed=gan.step, text="")

    @hookimpl
    def post_step(self, gan: GAN, phase: str, step: int) -> None:
        """Move the bar, or print a line now and then."""
        now = time.perf_counter()
        if phase == "d" or now - self.drawn < (REFRESH if self.bar else PLAIN_EVERY):
            return
        self.drawn = now
        if self.bar:
            self.bar.update(self.task, completed=step, text=self.text(), refresh=True)
        else:
            left = (now - self.started) / (step - self.first) * (self.steps - step)
            self.console.print(
                f"step {step}/{self.steps}  {self.text()}  {left:.0f} s left", highlight=False, soft_wrap=True
            )

    def text(self) -> str:
        """Losses and the latest metrics."""
        stats = self.stats.last if self.stats else {}
        losses = f"D {stats['d_loss']:.3f}  G {stats['g_loss']:.3f}" if stats else ""
        return f"{losses}  {self.latest}".strip()

    def metrics(self, step: int, found: Mapping[str, float]) -> None:
        """The metrics of an evaluation."""
        known = {metric_of(name): name for name in found}
        ranked = (("modes", "high_quality"), ("fid",), ("sliced_wasserstein",))
        chosen = next(names for wanted in ranked if (names := [known[name] for name in wanted if name in known]))
        self.latest = "  ".join(f"{label(metric_of(name))} {shown(name, found[name])}" for name in chosen)
        if not self.bar:
            self.console.print(f"step {step}/{self.steps}  {self.text()}", highlight=False, soft_wrap=True)

    def finding(self, finding: Finding) -> None:
        """A warning above the bar."""
        self.console.print(
            f"[yellow]warning:[/] {finding.name} ({finding.word}): {escape(finding.seen)}; "
            f"what to try: gankit diagnose {escape(self.path)}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip

    def stop(self) -> None:
        """Take the bar down."""
        if self.bar:
            self.bar.stop()


def networks_line(gan: GAN) -> str:
    """Players and their sizes, the loss, and the plugins that are on."""
    sizes = ", ".join(
        f"{name} {sum(p.numel() for p in player.module.parameters()):,}" for name, player in gan.players.items()
    )
    return f"parameters: {sizes}; loss {gan.loss.name}; plugins: {', '.join(gan.plugins) or 'none'}"


def metrics_table(found: Mapping[str, float], truth: Mapping[str, float]) -> Table:
    """Generated samples beside true ones, which are the best to be hoped for."""
    table = Table("metric", box=None, header_style="bold", pad_edge=False)
    table.add_column("generated", justify="right")
    table.add_column("true data", justify="right", style="dim")
    for name, value in found.items():
        table.add_row(escape(label(name)), shown(name, value), shown(name, truth.get(name)))
    return table


def terms_table(stats: Mapping[str, Any], owners: Iterable[str]) -> Table | None:
    """Each term's value and share of the gradient, and each plugin's time; None without plugins."""
    owners = list(owners)
    if not owners or not stats:
        return None
    table = Table("loss term", box=None, header_style="bold", pad_edge=False)
    table.add_column("value", justify="right")
    table.add_column("share of gradient", justify="right")
    for phase in "dg":
        for key, value in stats.items():
            if key.startswith(f"{phase}_loss/"):
                name = key.split("/", 1)[1]
                share = stats.get(f"gradient_share/{phase}/{name}")
                table.add_row(f"{phase.upper()} {name}", f"{value:.4f}", "-" if share is None else f"{share:.0%}")
    for name in owners:
        ms = stats.get(f"ms/{name}")
        cost = "-" if ms is None else f"{ms:.2f} of {stats['ms/step']:.2f} ms per step"
        table.add_row(f"[dim]plugin {name}[/]", "", cost)
    return table


def show_result(console: Console, result: Result, reported: bool = True) -> None:
    """The end of a run: tables, and where everything lies. reported: curves and report were to be drawn."""
    console.print()
    if result.metrics:
        console.print(metrics_table(result.metrics, result.truth))
        console.print()
    terms = terms_table(result.stats, result.plugins)
    if terms:
        console.print(terms)
        console.print()
    console.print(f"{result.status} after step {result.step} of {result.steps} ({result.seconds:.1f} s)")
    lines = [f"picture: {path}" for path in result.run.fakes()[-1:]]
    curves, page = result.run.path / "curves.png", result.run.path / "report.html"
    if reported:
        drawn = curves if curves.exists() else 'pip install "gankit[plot]" to have them drawn'
        lines.append(f"curves: {drawn}")
    lines.append(f"report: {page if reported and page.exists() else f'gankit report {result.run.path}'}")
    name, command = ("continue", "resume") if result.status == "interrupted" else ("sample", "sample")
    lines.append(f"{name}: gankit {command} {result.run.path}")
    if result.findings:
        names = ", ".join(f"{finding.name} ({finding.word})" for finding in result.findings)
        lines.append(f"found: {names}; what to try: gankit diagnose {result.run.path}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_diagnosis(console: Console, path: Path, diagnosis: Diagnosis) -> None:
    """What was found, the surest first, with what to try; what was looked at; and what could not be."""
    console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    told: dict[object, str] = {}
    for finding in diagnosis.findings:
        console.print(f"\n[bold]{finding.name}[/]: {finding.word}", highlight=False)
        console.print(f"  seen: {escape(finding.seen)}", highlight=False, soft_wrap=True)
        before = told.setdefault(finding.to_try, finding.name)
        if before != finding.name:
            console.print(f"  try: as for {before}", highlight=False)
            continue
        for number, suggestion in enumerate(finding.to_try, 1):
            console.print(f"  try {number}: {escape(suggestion.why)}", highlight=False, soft_wrap=True)
            console.print(f"         {escape(suggestion.command)}", highlight=False, soft_wrap=True)
    console.print(f"\n{'no sign of' if diagnosis.findings else 'nothing found; looked at'}: "
                  f"{', '.join(diagnosis.healthy) or 'nothing'}", highlight=False, soft_wrap=True)  # fmt: skip
    for name, reason in diagnosis.unknown.items():
        console.print(f"[dim]not looked at: {name}: {escape(reason)}[/]", highlight=False, soft_wrap=True)


class BenchProgress:
    """Progress of a suite: a bar on a terminal, a line per run elsewhere."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, expand=True)
        self.task = self.bar.add_task(name, total=None)

    def __enter__(self) -> BenchProgress:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, cell: Any, done: int, total: int) -> None:
        """A cell ended; or, at the start, None."""
        self.bar.update(self.task, completed=done, total=total)
        if not self.console.is_terminal:
            self.console.print(
                f"{self.name}: {done} of {total} runs{f', {cell.name}' if cell else ''}",
                highlight=False,
                soft_wrap=True,
            )


def show_bench(console: Console, suite: Suite, rows: list[Row], folder: Path) -> None:
    """The tables of a suite, and where everything lies."""
    from gankit.results import apart, cells_of, legend, tabulate

    if not console.is_terminal:
        console.width = max(console.width, WIDE)
    console.print(f"\n[bold]{escape(suite.title)}[/], protocol: {escape(suite.protocol)}", highlight=False)
    tables = tabulate(suite, rows)
    for table in tables:
        header, body = cells_of(table, brief=True)
        shown_table = Table(box=None, header_style="bold", pad_edge=False)
        shown_table.add_column(escape(header[0]), overflow="fold")
        for name in header[1:]:
            shown_table.add_column(escape(name), justify="right", overflow="fold")
        for row in body:
            shown_table.add_row(*(escape(cell.replace("`", "").replace("*", "")) for cell in row))
        steps = table.lines[0].steps if table.lines else 0
        console.print(f"\n{escape(table.data)}, {steps:,} steps", highlight=False)
        if alone := apart(table, tables):
            console.print(escape(alone), highlight=False, soft_wrap=True)
        console.print(shown_table)
        for line in table.lines:
            for reason in line.failed:
                console.print(
                    f"[yellow]{escape(line.method)} failed,[/] {escape(reason)}", highlight=False, soft_wrap=True
                )
    console.print(f"\n[dim]{escape(legend(suite))}[/]", highlight=False)
    for name in ("results.md", "results.json", "results.html"):
        if (folder / name).exists():
            console.print(f"tables: {folder / name}", highlight=False, markup=False, soft_wrap=True)
    for path in sorted(folder.glob("samples-*.png")):
        console.print(f"samples: {path}", highlight=False, markup=False, soft_wrap=True)


def show_order(console: Console, session: Session) -> None:
    """Which hook calls what, in which order: the whole of a step."""
    gan = session.gan
    console.print("once:")
    for hook in ("players", "setup"):
        _show_hook(console, gan, hook)
    times = f"{gan.d_steps} D updates" if gan.d_steps > 1 else "one D update"
    console.print(f"every step, {times}:")
    for hook in ("sample", "view", "critic", "pre_d_loss", "post_step"):
        _show_hook(console, gan, hook)
    console.print("and one G update, at once with D's last:" if gan.simultaneous else "then one G update:")
    for hook in ("sample", "view", "critic", "post_g_loss", "post_step"):
        _show_hook(console, gan, hook)
    console.print(f"every {session.config.eval_every} steps:")
    _show_hook(console, gan, "evaluate")


RULES = {"sample": "first answer", "view": "first answer", "critic": "first answer", "players": "all collected",
         "pre_d_loss": "all summed", "post_g_loss": "all summed", "evaluate": "all collected"}  # fmt: skip


def _show_hook(console: Console, gan: GAN, hook: str) -> None:
    impls = getattr(gan.hook, hook).get_hookimpls()[::-1]
    wrappers = [impl.plugin_name for impl in impls if impl.wrapper]
    plain = [impl.plugin_name for impl in impls if not impl.wrapper]
    inner = " -> ".join(plain) or "nothing"
    around = f"{' ( '.join(wrappers)} ( {inner}{' )' * len(wrappers)}" if wrappers else inner
    rule = f"  [dim]{RULES[hook]}[/]" if hook in RULES else ""
    console.print(f"  [bold]{hook:<12}[/] {around}{rule}", highlight=False, soft_wrap=True)
