"""What is wrong with a run, and what to try: rules on what it logged. Free of torch.

Each rule looks at the rows of a run's ``signals.jsonl``, ``metrics.jsonl`` and ``stats.jsonl`` and says nothing, or what it
saw, how sure it is, and what to try, the best measured first. docs/diagnose.md has the measured rates of hits and false
alarms. Where a threshold has three values, they are those from which a finding is possible, likely and certain.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gankit.config import RECIPES, Config, kind_of
from gankit.options import TRUE
from gankit.plugins import snake_case

if TYPE_CHECKING:
    from gankit.run import Reporter
    from gankit.rundir import RunDir

Row = Mapping[str, Any]
Levels = tuple[float, float, float]

SURE = (0.6, 0.8, 0.95)  # of a finding that is possible, likely, certain
WORDS = dict(zip(SURE, ("possible", "likely", "certain"), strict=True))

# Of the spread of the data. Untrained networks have about 0.1; what has modes at all keeps more than half of it.
ALIKE: Levels = (0.25, 0.2, 0.1)
# Share of samples with a near twin, beyond that of true samples: a fine G on a thin set may have some, and of a latent of
# one dimension, along which samples lie as on a string, about half.
TWINS: Levels = (0.65, 0.75, 0.9)
# Share of the data at whose anchors there are next to no samples. One lost mode of eight is 0.125.
MISSING: Levels = (0.1, 0.2, 0.4)
LASTING = 3  # evaluations: what young networks do passes
EMPTY = 0.1  # of the samples due there: what remains at an anchor that counts as lost
# Share of one class among the samples, where the data have less than half as much of it.
ONE_CLASS: Levels = (0.9, 0.95, 0.99)
# Share of samples that go to other anchors from one evaluation to the next: 0.03 to 0.15 where training is calm.
MOVING: Levels = (0.3, 0.45, 0.6)
# How often D puts a true sample above a generated one, least of three evaluations.
SEPARATED: Levels = (0.99, 0.998, 0.9999)
# How often D puts a training sample above a held-out one. 0.5 plus chance, which is held below three standard errors.
MEMORY: Levels = (0.6, 0.7, 0.85)
ERRORS = 3.0
# Distance from x to G(E(x)), of the distance to samples of G that have nothing to do with x; E that inverts G: below 0.25.
ASTRAY: Levels = (0.35, 0.5, 0.8)
# Share of samples that lie where the data are, of the share of true samples that do.
POOR: Levels = (0.5, 0.3, 0.15)
RIPE = 0.75  # of the steps, before which samples are not judged: they may be poor because they are young
GROWING = 1.1  # times as many samples near the data as at half of the steps: training is not at its end
STILL = 1e-9  # relative change of a norm of weights in which nothing moves; rounding is far below, any step far above
# Times above a recipe's rate, and below it, where a tenth (of three digits) is a remedy.
FAR, SLOW = 4.0, 10.1
FLAT = 1e-6  # relative change of a loss that does not move: batches alone change it more, unless D is constant
# Root mean square gradient of G. Adam's steps shrink below its epsilon, 1e-8; rates are meant for 1e-5 and more.
VANISHED: Levels = (1e-6, 3e-7, 1e-7)
# Root mean square gradient, or loss. Healthy ones are below 0.1 and 10.
EXPLODED: Levels = (10.0, 100.0, 1000.0)
LOUD: Levels = (1e3, 1e4, 1e5)


class Unknown(Exception):
    """A rule cannot tell: what it needs is not there. The message says what."""


@dataclass(frozen=True)
class Suggestion:
    """Something to try: why, with its source, and the command."""

    why: str
    command: str


@dataclass(frozen=True)
class Finding:
    """What was seen, how sure that is (0 to 1), and what to try, the best first."""

    name: str
    seen: str
    sure: float
    to_try: tuple[Suggestion, ...]

    @property
    def word(self) -> str:
        """Certain, likely or possible."""
        return WORDS[self.sure]

    def plain(self) -> dict[str, Any]:
        """The finding in plain containers, for JSON."""
        return asdict(self) | {"word": self.word}


@dataclass(frozen=True)
class Diagnosis:
    """Findings, the surest first; the rules that looked and found nothing; those that could not look, and why."""

    findings: tuple[Finding, ...]
    healthy: tuple[str, ...]
    unknown: Mapping[str, str]

    def plain(self) -> dict[str, Any]:
        """The diagnosis in plain containers, for JSON."""
        findings = [finding.plain() for finding in self.findings]
        return {"findings": findings, "nothing_seen": list(self.healthy), "not_looked_at": dict(self.unknown)}


@dataclass(frozen=True)
class Record:
    """What a run logged. ``path``: of its folder, for the commands of suggestions."""

    config: Config
    signals: Sequence[Row] = ()
    metrics: Sequence[Row] = ()
    stats: Sequence[Row] = ()
    path: str = "runs/RUN"
    kind: str = "plane"  # of the data, as in config.RECIPES
    classes: Sequence[str] = ()  # their names

    @classmethod
    def read(cls, run: RunDir) -> Record:
        """The record of a run's folder, finished or not."""
        from gankit.run import recorded_config

        names = ("signals.jsonl", "metrics.jsonl", "stats.jsonl")
        data = run.read_json("data.json")
        signals, metrics, stats = map(run.rows, names)
        kind, classes = kind_of(tuple(data["shape"])), tuple(data.get("class_histogram", ()))
        return cls(recorded_config(run), signals, metrics, stats, str(run.path), kind, classes)

    @property
    def steps(self) -> int:
        """How many steps the run is to have."""
        return self.config.steps or 0

    def rate(self, phase: str) -> float:
        """The rate of a phase before any decay, as far as it is known."""
        logged = next((row[f"lr_{phase}"] for row in self.stats[:1] if f"lr_{phase}" in row), None)
        return float(getattr(self.config, f"lr_{phase}") or 0.0 if logged is None else logged)

    def evaluations(self, column: str, least: int = 1) -> list[Row]:
        """Rows of signals.jsonl with this column, of evaluations; Unknown if there are fewer than ``least``."""
        found = [row for row in self.signals if row["step"] is not None and row.get(column) is not None]
        if len(found) >= least:
            return found
        if not self.signals:
            raise Unknown("the run has no signals.jsonl: it was made by an older gankit")
        raise Unknown(f"{least} evaluations are needed, and there are {len(found)}")

    def truth(self, column: str) -> Any:
        """What held-out samples have in this column."""
        row = next((row for row in self.signals if row["step"] is None), None)
        if row is None or row.get(column) is None:
            raise Unknown(f"signals.jsonl has no row of true samples with {column}")
        return row[column]

    def lasting(self, column: str) -> list[Row]:
        """The last LASTING evaluations: what is seen in all is no passing state. Fewer, if they are all there will be."""
        found = self.evaluations(column)
        if len(found) < LASTING and found[-1]["step"] != self.steps:
            raise Unknown(f"it is too early: {LASTING} evaluations are needed, and there are {len(found)}")
        return found[-LASTING:]


def graded(value: float, levels: Levels) -> float | None:
    """How sure: of the hardest of three levels that the value reaches; falling levels are reached from above."""
    falling = levels[0] > levels[2]
    reached = [
        sure for sure, level in zip(SURE, levels, strict=True) if (value <= level if falling else value >= level)
    ]
    return reached[-1] if reached else None


# -- suggestions ---------------------------------------------------------------------------------------------------

# Plugins that a suggestion leaves out beside these: refused (docs/compatibility.md), or two constraints of one kind.
CLASHES = {
    "gradient_penalty": ("dragan", "weight_clipping"), "label_smoothing": ("veegan",), "spectral_norm": ("weight_clipping",)
}  # fmt: skip
TARGETS = ("non_saturating", "saturating", "least_squares")  # losses whose D has a target for a single logit

# What five seeds of the ring (8 modes) and the grid (25) gave: modes, and the share of samples that is near one.
# tests/benchmarks/outcomes.json
MEASURED = {
    "r1": "8.0 of 8 and 25.0 of 25 modes on ring and grid, 95 and 88 % of the samples near one, where no plugin had 7.4 and "
    "16.4, 96 and 77 %; arXiv:1801.04406",
    "spectral_norm": "8.0 of 8 and 25.0 of 25 modes on ring and grid, 95 and 80 % of the samples near one; arXiv:1802.05957",
    "gradient_penalty": "8.0 of 8 and 25.0 of 25 modes on ring and grid, 95 and 80 % of the samples near one; "
    "arXiv:1704.00028",
    "packing": "8.0 of 8 and 23.4 of 25 modes on ring and grid, but of the grid's samples only 9 % near one: with lower "
    "learning rates; arXiv:1712.04086",
    "diffaugment": "D never sees the same image twice; arXiv:2006.10738",
    "consistency": "D has to score slightly changed samples alike; 19.2 of 25 modes on the grid, 84 % of the samples near "
    "one; arXiv:1910.12027",
    "lecam": "made for little data; 18.4 of 25 modes on the grid, 57 % of the samples near one; arXiv:2104.03310",
    "label_smoothing": "extreme logits cost D instead of paying; no gain in modes on ring and grid; arXiv:1606.03498",
}
SLOWER = (
    "smaller steps: half of G's learning rate and a tenth of D's gave 8.0 of 8 and 23.2 of 25 modes on ring and grid, but "
    "of the grid's samples only 41 % near one; arXiv:1706.08500"
)

PAIRWISE = (
    "in BiGAN's place: 8.0 of 8 and 25.0 of 25 modes on ring and grid, 95 and 82 % of the samples near one, where BiGAN had "
    "7.4 and 22.2, 78 and 84 %; arXiv:1802.00771"
)

STOCHASTIC = (
    "an E that draws its code: of pairwise_gp with two normal dimensions 68 % of the samples were then on the ring's modes, "
    "not 22 %, and E inverted G (one seed); arXiv:1606.00704"
)
ONE_DIMENSION = (
    "96 % of the samples of pairwise_gp were on the ring's modes with it, 13 % with two normal dimensions (one seed, equal "
    "rates, G an MLP); arXiv:1802.00771"
)


def again(
    record: Record,
    why: str,
    changes: Mapping[str, Any] | None = None,
    plugin: str | None = None,
    options: str = "",
    instead: str | None = None,
) -> Suggestion:
    """The run once more with settings changed or a plugin added, in another's place if named, as a command."""
    words = ["gankit", "run", "--config", shlex.quote(f"{record.path}/config.toml")]
    folder = Path(record.path).parent
    if folder != Path(record.config.out):  # it was moved here, or trained on another machine
        words += ["--out", shlex.quote(str(folder))]
    if plugin:  # flags replace what the file has
        on = [name for name in record.config.plugin if name != instead]
        words += [word for name in (*on, plugin) for word in ("--plugin", shlex.quote(name))]
    words += options.split()
    for name, value in (changes or {}).items():
        words += [f"--{name.replace('_', '-')}", f"{value:.3g}" if isinstance(value, float) else str(value)]
    if record.config.name:  # the recorded one is taken
        words += ["--name", shlex.quote(f"{record.config.name}-{plugin or 'again'}")]
    return Suggestion(why, " ".join(words))


def plugins(record: Record, *names: str) -> Iterator[Suggestion]:
    """Those of these plugins that are not on and can be added."""
    on = {snake_case(spec.rpartition(":")[2]) for spec in record.config.plugin}
    for name in names:
        unfit = (
            (name == "diffaugment" and record.kind != "image")
            or (name == "packing" and (record.config.batch or 0) % 2)
            or (name == "label_smoothing" and record.config.loss not in TARGETS)
            or (name == "lecam" and record.config.loss not in (*TARGETS, "wasserstein", "hinge"))
        )
        if name in on or unfit or on.intersection(CLASHES.get(name, ())):
            continue
        # as it was measured; another scale of the data needs another
        weight = {"r1": 1, "gradient_penalty": 1}.get(name) if record.config.data in ("ring", "grid") else None
        yield again(record, MEASURED[name], {}, name, f"-o {name}.weight={weight}" if weight else "")


def rates(record: Record, why: str, new: Mapping[str, float]) -> Suggestion:
    """The run once more with other rates, by "lr_g" and "lr_d"."""
    if "ttur" in record.config.plugin:  # whose rates win over those of the run
        return again(record, why, options=" ".join(f"-o ttur.{name}={rate:.3g}" for name, rate in new.items()))
    return again(record, why, new)


def slower(record: Record, why: str, g: float = 1.0, d: float = 1.0) -> Suggestion:
    """The run once more with its rates multiplied by these factors."""
    return rates(record, why, {f"lr_{p}": f * record.rate(p) for p, f in (("g", g), ("d", d)) if f != 1})


def usual_rates(record: Record) -> Iterator[Suggestion]:
    """The rates of the recipe, where the run's are far from them."""
    usual = {p: RECIPES[record.kind][f"lr_{p}"] for p in "gd"}
    if any(not usual[p] / SLOW <= record.rate(p) <= usual[p] * FAR for p in "gd"):
        why = "the rates that gankit run has for such data; docs/decisions/0005"
        yield rates(record, why, {f"lr_{p}": rate for p, rate in usual.items()})


def without_momentum(record: Record) -> Iterator[Suggestion]:
    """Adam's first moment off, where it is on."""
    if record.config.beta1:
        why = "without momentum, 85 % instead of 56 % of high quality on the ring: docs/decisions/0005"
        yield again(record, why, {"beta1": 0})


def against_collapse(record: Record) -> Iterator[Suggestion]:
    """What helps a generator that leaves out parts of the data."""
    yield from usual_rates(record)
    if "bigan" in record.config.plugin and not record.config.options.get("bigan"):
        yield again(record, PAIRWISE, {}, "pairwise_gp", instead="bigan")
    yield from plugins(record, "r1", "spectral_norm", "gradient_penalty")
    if all(record.rate(p) >= RECIPES[record.kind][f"lr_{p}"] / 2 for p in "gd"):
        yield slower(record, SLOWER, 0.5, 0.1)
    else:
        yield slower(record, "smaller steps; arXiv:1706.08500", 0.5, 0.5)
    yield from plugins(record, "packing")


def against_strong_d(record: Record) -> Iterator[Suggestion]:
    """What helps where D leaves G nothing to learn from."""
    yield from usual_rates(record)
    if record.config.loss == "saturating":
        yield again(
            record,
            "G's gradient does not vanish where D is sure; arXiv:1406.2661, section 3",
            {"loss": "non_saturating"},
        )
    if record.config.d_steps > 1 and record.config.loss != "wasserstein":
        yield again(record, "as many updates of D as of G", {"d_steps": 1})
    yield from plugins(record, "r1", "gradient_penalty", "spectral_norm", "label_smoothing")
    yield slower(record, "a slower D", d=0.25)


def against_explosion(record: Record) -> Iterator[Suggestion]:
    """What helps where numbers run away."""
    yield from usual_rates(record)
    bounds = ("gradient_penalty", "spectral_norm", "r1")
    if record.config.loss == "wasserstein":
        yield from plugins(record, *bounds)
    yield slower(record, "a tenth of both rates", 0.1, 0.1)
    if record.config.loss != "wasserstein":
        yield from plugins(record, "spectral_norm", "r1")


def against_poor_samples(record: Record) -> Iterator[Suggestion]:
    """What helps a generator whose samples differ, but are not where the data are."""
    yield from usual_rates(record)
    yield from without_momentum(record)
    rows = record.evaluations("precision")
    middle = [row["precision"] for row in rows if 2 * row["step"] <= record.steps][-1:]
    if middle and rows[-1]["precision"] >= GROWING * middle[0]:
        yield again(record, "more of them are near the data than half-way: train longer", {"steps": 2 * record.steps})
    yield from better_inverse(record)
    yield from plugins(record, "r1", "gradient_penalty", "spectral_norm")
    yield slower(record, "smaller steps; arXiv:1706.08500", 0.5, 0.5)


def against_poor_inverse(record: Record) -> Iterator[Suggestion]:
    """What helps an encoder find the latents of what it sees."""
    yield from usual_rates(record)
    yield from better_inverse(record)
    yield slower(record, "smaller steps; arXiv:1706.08500", 0.5, 0.5)


def better_inverse(record: Record) -> Iterator[Suggestion]:
    """What was seen to make E an inverse of G, of runs that have an E."""
    for name in {"bigan", "pairwise_gp"}.intersection(record.config.plugin):
        if record.kind == "plane" and record.config.z_dim != 1:
            yield again(record, ONE_DIMENSION, {"z_dim": 1, "z": "uniform"})
        if str(record.config.options.get(name, {}).get("stochastic")).lower() not in TRUE:
            yield again(record, STOCHASTIC, options=f"-o {name}.stochastic=yes")


# -- rules -----------------------------------------------------------------------------------------------------------

Seen = tuple[str, float, Iterator[Suggestion]] | None


def not_finite(record: Record) -> Seen:
    """A loss, a weight or a sample that is not a number or infinite."""
    stopped = [row for row in record.signals if row.get("diverged")]
    spoilt = [row for row in record.signals if row.get("finite", 1) < 1]
    empty = [
        (row["step"], key) for row in record.stats for key, value in row.items() if "loss" in key and value is None
    ]
    if stopped:
        seen = f"training stopped: {stopped[-1]['diverged']}"
    elif spoilt:
        seen = f"at step {spoilt[-1]['step']}, {1 - spoilt[-1]['finite']:.0%} of the samples were not finite"
    elif empty:
        seen = f"at step {empty[0][0]}, {empty[0][1]} was not finite"
    elif not record.signals and not record.stats:
        raise Unknown("nothing was logged yet")
    else:
        return None
    return seen, SURE[2], against_explosion(record)


def collapse(record: Record) -> Seen:
    """Samples that are all alike."""
    rows = record.lasting("spread")
    spread = max(row["spread"] for row in rows)
    usual = record.truth("duplicates")
    twins = min(row["duplicates"] for row in rows) - usual
    found = [sure for sure in (graded(spread, ALIKE), graded(twins, TWINS)) if sure]
    if not found:
        return None
    share = f"{twins + usual:.0%} of the samples have a near twin (true ones: {usual:.0%})"
    seen = f"samples differ {spread:.2g} times as much as true ones do, and {share}"
    return f"{seen}, {_when(rows)}", max(found), against_collapse(record)


def lost_modes(record: Record) -> Seen:
    """Parts of the data that are hardly generated."""
    if not record.signals:
        return _lost_by_metrics(record)
    rows = record.lasting("cells")
    true = record.truth("cells")
    lost = min(missing(row["cells"], true) for row in rows)
    sure = graded(lost, MISSING)
    if not sure:
        return None
    return f"next to no samples where {lost:.0%} of the data are, {_when(rows)}", sure, against_collapse(record)


def _lost_by_metrics(record: Record) -> Seen:
    true, *rows = [row for row in record.metrics if row.get("modes") is not None] or [{}]
    if len(rows) < LASTING:
        raise Unknown(f"the run has no signals.jsonl and fewer than {LASTING} evaluations of known modes")
    rows = rows[-LASTING:]
    most = max(row["modes"] for row in rows)
    if most > (1 - MISSING[0]) * true["modes"]:
        return None
    return f"{most:.0f} of {true['modes']:.0f} modes or fewer, {_when(rows)}", SURE[1], against_collapse(record)


def missing(made: Sequence[int], true: Sequence[int]) -> float:
    """Share of the true samples at anchors that have less than EMPTY of the generated samples due to them."""
    shares = [(m / sum(made), t / sum(true)) for m, t in zip(made, true, strict=True)]
    return sum(t for m, t in shares if m < EMPTY * t)


def moved(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of samples that are at another anchor: the total variation distance of two histograms."""
    return sum(abs(a / sum(one) - b / sum(other)) for a, b in zip(one, other, strict=True)) / 2


def one_class(record: Record) -> Seen:
    """All samples of one class, while the data have several."""
    if record.signals and "labels" not in record.signals[0]:
        raise Unknown("the data have no classes")
    rows = record.lasting("labels")
    true = record.truth("labels")
    shares = [max(row["labels"]) / sum(row["labels"]) for row in rows]
    label = rows[-1]["labels"].index(max(rows[-1]["labels"]))
    sure = graded(min(shares), ONE_CLASS)
    if not sure or true[label] / sum(true) > ONE_CLASS[0] / 2:
        return None
    name = record.classes[label] if record.classes else label
    seen = f"{shares[-1]:.0%} of the samples are of class {name}, of which the data have {true[label] / sum(true):.0%}"
    return f"{seen}, {_when(rows)}", sure, against_collapse(record)


def oscillation(record: Record) -> Seen:
    """A generator that goes around between parts of the data."""
    rows = record.evaluations("cells", 2 * LASTING)
    rows = rows[-max(LASTING + 1, len(rows) // 2) :]
    now = [row.get("cells_now", row["cells"]) for row in rows]
    moving = sum(moved(a, b) for a, b in pairwise(now)) / (len(now) - 1)
    sure = graded(moving, MOVING)
    if not sure:
        return None
    seen = f"from one evaluation to the next {moving:.0%} of the samples go elsewhere, {_when(rows)}"
    return seen, sure, _against_oscillation(record)


def _against_oscillation(record: Record) -> Iterator[Suggestion]:
    yield from usual_rates(record)
    yield from without_momentum(record)
    yield from plugins(record, "r1", "gradient_penalty", "spectral_norm")
    yield slower(record, "smaller steps; arXiv:1706.08500", 0.5, 0.5)


def saturated(record: Record) -> Seen:
    """A discriminator that tells all samples apart, so that G may have nothing to go by."""
    if record.config.loss == "wasserstein":
        raise Unknown("a Wasserstein critic may tell all samples apart and still teach (arXiv:1701.07875)")
    rows = record.evaluations("separation", LASTING)[-LASTING:]
    least = min(min(row["separation"], row["held_out_separation"]) for row in rows)
    sure = graded(least, SEPARATED)
    if not sure:
        return None
    seen = f"D puts a true sample above a generated one in {least:.1%} of pairs or more, {_when(rows)}"
    return seen, sure, against_strong_d(record)


def overfitted(record: Record) -> Seen:
    """A discriminator that knows the training samples by heart."""
    rows = record.lasting("memory")
    pack = max(row.get("pack", 1) for row in rows)  # older versions did not record it
    sizes = record.truth("train") / pack, record.truth("held_out") / pack
    # of the area under the curve, for equal distributions
    error = ((sum(sizes) + 1) / (12 * sizes[0] * sizes[1])) ** 0.5
    memory = min(row["memory"] for row in rows)
    sure = graded(memory, MEMORY)
    if not sure or memory < 0.5 + ERRORS * error:
        return None
    seen = f"D puts a training sample above a held-out one in {memory:.0%} of pairs (50 % is chance), {_when(rows)}"
    return seen, sure, _against_overfitting(record)


def _against_overfitting(record: Record) -> Iterator[Suggestion]:
    yield from plugins(record, "diffaugment", "lecam", "consistency", "r1")
    yield slower(record, "a slower D", d=0.25)


def poor_inverse(record: Record) -> Seen:
    """An encoder that does not find what G makes of x."""
    if record.lasting("spread") and not any("reconstruction" in row for row in record.signals):
        raise Unknown("the run has no encoder")
    rows = record.lasting("reconstruction")
    error = min(row["reconstruction"] for row in rows)
    sure = graded(error, ASTRAY)
    lost = min(missing(row["cells"], record.truth("cells")) for row in rows)
    if not sure or lost >= MISSING[2] or max(row["spread"] for row in rows) <= ALIKE[0]:
        return None  # for what G does not make there is no latent to be found
    seen = f"G(E(x)) is {error:.2g} times as far from x as samples of G that have nothing to do with x"
    return f"{seen}, {_when(rows)}", sure, against_poor_inverse(record)


def frozen(record: Record) -> Seen:
    """A network whose weights stay what they are."""
    rows = record.evaluations("d_norm", LASTING)[-LASTING:]
    still = [
        phase for phase in "dg"
        if all(_still(a[f"{phase}_norm"], b[f"{phase}_norm"]) for a, b in pairwise(rows))
    ]  # fmt: skip
    if not still:
        return None
    names = " and ".join({"d": "the discriminator", "g": "the generator"}[phase] for phase in still)
    off = [phase for phase in still if not getattr(record.config, f"lr_{phase}")]
    reason = f"; {' and '.join(f'--lr-{p}' for p in off)} is 0" if off else ""
    return f"the weights of {names} do not move, {_when(rows)}{reason}", SURE[2], _against_frozen(record, off)


def _still(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and abs(before - after) <= STILL * after


def _against_frozen(record: Record, off: list[str]) -> Iterator[Suggestion]:
    if off:
        yield rates(record, "a rate above 0", {f"lr_{p}": RECIPES[record.kind][f"lr_{p}"] for p in off})
        return
    yield slower(record, "units that are off for all inputs get no gradient: start anew with a lower rate", 0.1, 0.1)
    yield again(record, "or from other weights", {"seed": record.config.seed + 1})


def flat_losses(record: Record) -> Seen:
    """Losses that do not move."""
    rows = [row for row in record.stats if row.get("d_loss") is not None]
    if len(rows) < 4:
        raise Unknown(f"4 lines of stats.jsonl are needed, and there are {len(rows)}")
    rows = rows[-max(4, len(rows) // 2) :]
    late = {key: [row[key] for row in rows] for key in ("d_loss", "g_loss")}
    if any(max(values) - min(values) > FLAT * max(1.0, abs(values[-1])) for values in late.values()):
        return None
    d, g = (values[-1] for values in late.values())
    return f"D's loss stays at {d:.5g} and G's at {g:.5g}, {_when(rows)}", SURE[2], _against_frozen(record, [])


def vanishing(record: Record) -> Seen:
    """A generator that gets no gradient."""
    rows = record.lasting("g_gradient")
    size = max(row["g_gradient"] for row in rows)
    sure = graded(size, VANISHED)
    if not sure:
        return None
    return f"G's gradient is {size:.1e} per weight (root mean square), {_when(rows)}", sure, against_strong_d(record)


def exploding(record: Record) -> Seen:
    """Gradients or losses that run away."""
    rows = [row for row in record.stats if row.get("d_loss") is not None]
    if not rows and not record.signals:
        raise Unknown("nothing was logged yet")
    # a Wasserstein critic is defined up to a constant, which is in the adversarial part of G's loss
    floating = record.config.loss == "wasserstein"
    g_losses = [row["g_loss"] - (row.get("g_loss/adv", row["g_loss"]) if floating else 0.0) for row in rows[-2:]]
    loss = max(map(abs, [*(row["d_loss"] for row in rows[-2:]), *g_losses]), default=0.0)
    sized = [row for row in record.signals if all(row.get(f"{phase}_gradient") is not None for phase in "dg")]
    last = [row for row in sized if row["step"] is not None][-2:]
    sizes = {phase: min((row[f"{phase}_gradient"] for row in last), default=0.0) for phase in "dg"}
    found = [sure for sure in (graded(loss, LOUD), graded(max(sizes.values()), EXPLODED)) if sure]
    if not found:
        return None
    seen = [f"gradients per weight of {sizes['d']:.1e} (D) and {sizes['g']:.1e} (G)"] if last else []
    seen += [f"losses up to {loss:.1e}"] if rows else []
    return f"{', '.join(seen)}, {_when(last or rows[-2:])}", max(found), against_explosion(record)


def poor_samples(record: Record) -> Seen:
    """Samples that lie where the data are not."""
    true = record.truth("precision")
    rows = record.lasting("precision")
    if rows[-1]["step"] < RIPE * record.steps:
        raise Unknown(f"it is too early: samples are judged from {RIPE:.0%} of the steps on")
    usual = median(row["precision"] for row in rows)  # what is lost late does not come back by itself
    sure = graded(usual / true, POOR) if true else None
    if not sure:
        return None
    seen = f"{usual:.0%} of the samples are as near to a training sample as its neighbours are (true ones: {true:.0%})"
    return f"{seen}, {_when(rows)}", sure, against_poor_samples(record)


def _when(rows: Sequence[Row]) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    return f"at step {last}" if first == last else f"from step {first} to {last}"


RULES: dict[str, Callable[[Record], Seen]] = {
    "not finite": not_finite,
    "collapse": collapse,
    "lost modes": lost_modes,
    "one class": one_class,
    "oscillation": oscillation,
    "saturated D": saturated,
    "overfitted D": overfitted,
    "poor inverse": poor_inverse,
    "frozen network": frozen,
    "flat losses": flat_losses,
    "vanishing gradient": vanishing,
    "exploding": exploding,
    "poor samples": poor_samples,  # last: of two that are equally sure, the other says more
}


def diagnose(record: Record) -> Diagnosis:
    """Apply all rules to what a run logged."""
    findings, healthy, unknown = [], [], {}
    for name, rule in RULES.items():
        try:
            seen = rule(record)
        except Unknown as reason:
            unknown[name] = str(reason)
            continue
        if seen:
            findings.append(Finding(name, seen[0], seen[1], tuple(seen[2])))
        else:
            healthy.append(name)
    return Diagnosis(tuple(sorted(findings, key=lambda finding: -finding.sure)), tuple(healthy), unknown)


def worth_a_warning(finding: Finding) -> bool:
    """Whether to speak while the run goes on: of what is likely or certain."""
    return finding.sure >= SURE[1]


class Watch:
    """Passes evaluations on to the reporter and tells it of what is wrong, once for each finding."""

    def __init__(self, run: RunDir, reporter: Reporter) -> None:
        self.run, self.reporter = run, reporter
        self.told: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation ended, and all that was logged of it is in the run's folder."""
        self.reporter.metrics(step, metrics)
        for finding in diagnose(Record.read(self.run)).findings:
            if worth_a_warning(finding) and finding.name not in self.told:
                self.told.add(finding.name)
                self.reporter.finding(finding)
