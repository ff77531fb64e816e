"""The core's own behaviour during training, as hook implementations: averaging, decay, logging, metrics, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gankit import metrics, pictures, plane
from gankit.data import Dataset
from gankit.errors import Diverged
from gankit.gan import GAN, derive_seed
from gankit.hookspecs import hookimpl
from gankit.provenance import metric_of
from gankit.rundir import RunDir

# Prime, so that a term applied in every k-th step is met as often as it occurs.
PROBE_EVERY = 47


class Averaging:
    """An exponential moving average of G: theta_ema <- decay theta_ema + (1 - decay) theta after every step.

    The decay is min(decay, step / (step + 10)), so that the first average is not the initial network. Floating buffers
    (batch-norm statistics) are averaged alike; others, and those that hold infinities (masks), are copied. ``decay = 0``
    keeps no average.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay

    @hookimpl(wrapper=True, tryfirst=True)
    def setup(self, gan: GAN) -> Generator[None, Any, Any]:
        """Start from a copy of the generator as plugins have set it up, the last of them, too."""
        done = yield
        if self.decay:
            gan.averages["generator"] = copy.deepcopy(gan.generator).requires_grad_(False)
            pairs = list(zip(_tensors(gan.averages["generator"]), _tensors(gan.generator), strict=True))
            moving = [a.is_floating_point() and bool(a.isfinite().all()) for a, _ in pairs]
            self.averaged = [pair for pair, moves in zip(pairs, moving, strict=True) if moves]
            self.copied = [pair for pair, moves in zip(pairs, moving, strict=True) if not moves]
        return done

    @hookimpl
    @torch.no_grad()
    def post_step(self, gan: GAN, phase: str, step: int) -> None:
        """One update of the average per step."""
        if phase == "d" or not self.decay:
            return
        decay = min(self.decay, step / (step + 10))
        targets, sources = zip(*self.averaged, strict=True)
        torch._foreach_lerp_(targets, sources, 1 - decay)
        for average, current in self.copied:
            average.copy_(current)


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class LinearDecay:
    """Learning rates that fall linearly, from the share ``start`` of the steps to their share ``end`` after the last."""

    def __init__(self, start: float, steps: int, end: float = 0.0) -> None:
        self.start = round(start * steps)
        self.steps = steps
        self.end = end

    @hookimpl
    def post_step(self, gan: GAN, phase: str, step: int) -> None:
        """Set the rates of the next step."""
        if phase == "g" and step > self.start:
            self.set_rates(gan, step)

    def set_rates(self, gan: GAN, step: int) -> None:
        """The rates of the step after this one."""
        left = (self.steps - step) / (self.steps - self.start) if step > self.start else 1.0
        factor = self.end + (1 - self.end) * left
        for player, optimizer in gan.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * gan.optim[player].lr


class Stats:
    """Losses by term, shares of the gradient, and costs, averaged between lines of ``stats.jsonl``.

    Stops the run with :class:`Diverged` when a term is not finite: at once on a CPU, at the next line on a GPU, where
    looking costs a synchronisation.
    """

    def __init__(self, every: int, write: Callable[[dict[str, Any]], None]) -> None:
        self.every = every
        self.write = write
        self.last: dict[str, Any] = {}
        self.shares: dict[str, float] = {}
        self.backward_ms: dict[str, list[float]] = {}
        self.sums: dict[str, Any] = {}
        self.updates = {"d": 0, "g": 0}
        self.probed: tuple[int, str] | None = None
        self.probes = 0
        self.started = time.perf_counter()
        self.steps = 0

    @hookimpl
    def post_step(self, gan: GAN, terms: Mapping[str, Tensor], phase: str, step: int) -> None:
        """Add up the terms; write a line every ``every`` steps."""
        on_cpu = gan.device.type == "cpu"
        for name, term in terms.items():
            value: Any = term.item() if on_cpu else term
            if on_cpu and not math.isfinite(value):
                raise Diverged(_diverged(step, phase, name, value))
            key = f"{phase}_loss/{name}"
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.updates[phase] += 1
        if phase == "d":
            return
        self.steps += 1
        meter = gan.manager.meter
        self.probes += meter.on
        meter.on = (step + 1) % PROBE_EVERY == 0
        if step % self.every == 0:
            self.line(gan, step)

    def line(self, gan: GAN, step: int) -> None:
        """Write what was gathered since the last line."""
        # over all updates: a term that acts in every k-th one, k times as strong, counts as one that always does
        means = {key: float(total) / self.updates[key.partition("_")[0]] for key, total in self.sums.items()}
        for key, value in means.items():
            if not math.isfinite(value):
                phase, name = key.split("_loss/")
                raise Diverged(_diverged(step, phase, name, value))
        totals = {
            f"{phase}_loss": sum(v for key, v in means.items() if key.startswith(f"{phase}_loss/")) for phase in "dg"
        }
        now = time.perf_counter()
        self.last = {
            "step": step,
            **totals,
            **means,
            **{f"lr_{phase}": o.param_groups[0]["lr"] for phase, o in gan.optimizers.items()},
            **self.shares,
            **{f"ms/{name}": ms for name, ms in self.plugin_ms(gan).items()},
            "ms/step": 1000 * (now - self.started) / max(self.steps, 1),
        }
        self.write(self.last)
        self.sums, self.updates, self.started, self.steps = {}, {"d": 0, "g": 0}, now, 0

    def pause(self, seconds: float) -> None:
        """Leave time spent on evaluation and checkpoints out of ``ms/step``."""
        self.started += seconds

    def plugin_ms(self, gan: GAN) -> dict[str, float]:
        """Milliseconds per step by plugin: time inside its hooks plus the backward passes of its terms, on probed steps."""
        seconds = gan.manager.meter.seconds
        costs = {name: 1000 * seconds[name] / self.probes for name in seconds if self.probes}
        for name, times in self.backward_ms.items():
            costs[name] = costs.get(name, 0.0) + sum(times) / max(self.probes, 1)
        return costs

    @hookimpl(wrapper=True, tryfirst=True)
    def pre_d_loss(
        self, gan: GAN, real_logits: Tensor, fake_logits: Tensor, step: int
    ) -> Generator[None, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """On probed steps, the gradient's norm by term of D's loss."""
        added = yield
        if added and gan.manager.meter.on and self.probed != (step, "d"):
            adv = gan.loss.d(real_logits, fake_logits)
            self.probe(gan, "d", adv, added, step)
        return added

    @hookimpl(wrapper=True, tryfirst=True)
    def post_g_loss(
        self, gan: GAN, g_loss: Tensor, step: int
    ) -> Generator[None, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
        """On probed steps, the gradient's norm by term of G's loss."""
        added = yield
        if added and gan.manager.meter.on:
            self.probe(gan, "g", g_loss, added, step)
        return added

    def probe(self, gan: GAN, phase: str, adv: Tensor, added: list[dict[str, Tensor]], step: int) -> None:
        """Norm of each term's own gradient with respect to the phase's parameters, as a share of the norms' sum."""
        self.probed = (step, phase)
        terms = {"adv": adv, **dict(chain.from_iterable(map(dict.items, added)))}
        norms, clock = {}, gan.manager.meter.clock
        for name, term in terms.items():
            started = clock()
            gradients = torch.autograd.grad(term, gan.parameters(phase), retain_graph=True, allow_unused=True)
            owner = gan.manager.owners[{"d": "pre_d_loss", "g": "post_g_loss"}[phase], name]
            if owner != "core":
                times = self.backward_ms.setdefault(owner, [])
                times.append(1000 * (clock() - started) * (gan.d_steps if phase == "d" else 1))
            norms[name] = math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))
        total = sum(norms.values()) or 1.0
        self.shares |= {f"gradient_share/{phase}/{name}": norm / total for name, norm in norms.items()}


def _diverged(step: int, phase: str, name: str, value: float) -> str:
    return f"step {step}: term {name!r} of the {'discriminator' if phase == 'd' else 'generator'}'s loss is {value}"


class Metrics:
    """Metrics every data set allows (sliced Wasserstein and energy distance to held-out data), and modes where known."""

    def __init__(self, data: Dataset, n: int) -> None:
        self.data = data
        self.n = n
        self.held_out = data.held_out(n)

    def of(self, samples: Tensor) -> dict[str, float]:
        """All metrics of (n, \\*shape) samples."""
        found: dict[str, float] = {}
        if self.data.modes is not None:
            found |= self.data.modes.metrics(samples)
        generator = torch.Generator().manual_seed(0)
        found["sliced_wasserstein"] = metrics.sliced_wasserstein(samples, self.held_out, generator=generator)
        found["energy_distance"] = metrics.energy_distance(samples[:2000], self.held_out[:2000])
        return found

    @hookimpl
    def evaluate(self, draw: Callable[[int], Tensor]) -> dict[str, float]:
        """The metrics of generated samples."""
        return self.of(draw(self.n))


class Evaluator:
    """Every ``every`` steps: all ``evaluate`` hooks, a line of ``metrics.jsonl``, and a picture."""

    def __init__(
        self, run: RunDir, data: Dataset, every: int, steps: int, stats: Stats, report: Callable[..., None]
    ) -> None:
        self.run, self.data, self.every, self.steps, self.stats = run, data, every, steps, stats
        self.report = report
        self.best: list[float] = [-math.inf]
        self.at = 0  # the step that was best
        self.last: dict[str, float] = {}
        self.improved = False

    @hookimpl(wrapper=True, tryfirst=True)
    def post_step(self, gan: GAN, phase: str, step: int) -> Generator[None, Any, Any]:
        """Evaluate when due, and at the end, what all plugins have made of the step."""
        done = yield
        if phase == "g" and (step == self.steps or (self.every and step % self.every == 0)):
            self.now(gan)
        return done

    def now(self, gan: GAN) -> dict[str, float]:
        """Evaluate at once; ``improved`` tells whether this is the best so far."""
        started = time.perf_counter()
        self.last = measure(gan)
        self.improved = goodness(self.last) > self.best
        if self.improved:
            self.best, self.at = goodness(self.last), gan.step
        self.run.append("metrics.jsonl", {"step": gan.step, **self.last})
        record_provenance(gan, self.run)
        picture(gan, self.data, self.run.samples / f"fakes-{gan.step:06d}.png")
        self.report(gan.step, self.last)
        self.stats.pause(time.perf_counter() - started)
        return self.last

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, and its step."""
        return {"best": self.best, "at": self.at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.best, self.at = state["best"], state.get("at", 0)


def measure(gan: GAN, truth: Dataset | None = None) -> dict[str, float]:
    """All metrics of all ``evaluate`` hooks on the GAN as it is; always from the same latents.

    ``truth``: of this data set's training samples in the generator's place, which is what a perfect generator would get.
    """

    def draw(n: int) -> Tensor:
        return gan.draw(n, torch.Generator(gan.device).manual_seed(derive_seed(gan.seed, "evaluate")))

    with gan.manager.meter.paused():
        if truth is None:
            found = gan.hook.evaluate(gan=gan, draw=draw, step=gan.step)
        else:
            found = gan.hook.evaluate(gan=gan, draw=true_draw(truth), step=None)
    return {name: float(value) for result in found for name, value in result.items()}


def true_draw(data: Dataset) -> Callable[[int], Tensor]:
    """Draws training samples, always the same ones, as many as there are."""

    def draw(n: int) -> Tensor:
        index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n]
        return data.batch(index.to(data.device))

    return draw


def record_provenance(gan: GAN, run: RunDir) -> None:
    """Write ``provenance.json``: where the values of each column with a provenance come from."""
    if gan.provenance:
        run.write_json("provenance.json", gan.provenance)


def goodness(found: Mapping[str, float]) -> list[float]:
    """By what the best checkpoint is chosen: more modes, more of high quality, then less sliced Wasserstein distance.

    Where the modes' true shares are unequal, nearer shares beat quality, which the most frequent mode alone would
    win. A higher ``resolution``, which a growing generator reports, beats all of these: coarse images score well.
    """
    found = {metric_of(name): value for name, value in found.items()}
    more = {name: found.get(name, 0.0) for name in ("resolution", "modes", "high_quality", "kl_to_truth")}
    return [more["resolution"], more["modes"], -more["kl_to_truth"], more["high_quality"], -found["sliced_wasserstein"]]


def picture(gan: GAN, data: Dataset, path: Path) -> None:
    """What the generator makes now: points over the true ones, or a grid beside true images; always the same latents.

    Of 2-D data also what ``gankit report`` draws, ``fakes-<step>.npz``: the points, and D's value and gradient under them.
    """
    stream = torch.Generator(gan.device).manual_seed(derive_seed(gan.seed, "picture"))
    if data.is_image:
        columns = 8
        fake, real = gan.draw(columns**2, stream).cpu(), data.held_out(columns**2).cpu()
        made = pictures.side_by_side(pictures.image_grid(real, columns), pictures.image_grid(fake, columns))
    else:
        real, fake = data.held_out(2500).cpu(), gan.draw(2500, stream).cpu()
        limits = pictures.scatter_limits(real)  # of the real samples alone, so that all of a run's pictures agree
        made = pictures.scatter(real, fake, title=f"step {gan.step}", limits=limits)
        if data.shape == (2,):
            plane.save_frame(gan, fake, limits, path.with_suffix(".npz"))
    pictures.save_png(made, path)


class Saver:
    """Checkpoints every ``every`` steps and at the end; keeps the latest few and the best."""

    def __init__(self, run: RunDir, evaluator: Evaluator, every: int, steps: int, keep: int, stats: Stats) -> None:
        self.run, self.evaluator, self.every, self.steps, self.keep = run, evaluator, every, steps, keep
        self.stats = stats
        self.facts: dict[str, Any] = {}  # settings, versions and data, compared when the run is continued
        self.infinite: set[tuple[str, str]] = set()  # such as a mask of -inf
        self.saved = 0

    @hookimpl(wrapper=True, tryfirst=True)
    def setup(self, gan: GAN) -> Generator[None, Any, Any]:
        """Take note of what is not finite to begin with."""
        done = yield
        self.infinite = set(_infinite(gan))
        return done

    @hookimpl(wrapper=True, tryfirst=True)
    def post_step(self, gan: GAN, phase: str, step: int) -> Generator[None, Any, Any]:
        """Save when due, at the end, and whenever an evaluation was the best so far: what all plugins made of the step."""
        done = yield
        due = step == self.steps or (self.every and step % self.every == 0) or self.evaluator.improved
        if phase == "g" and due:
            self.now(gan)
        return done

    def now(self, gan: GAN) -> None:
        """Save at once, unless a weight has become not finite."""
        started = time.perf_counter()
        for network, key in _infinite(gan):
            if (network.removesuffix("_ema"), key) not in self.infinite:
                raise Diverged(f"step {gan.step}: weight {key!r} of the {network} is not finite")
        path = self.run.save(gan.weights(), {**gan.state_dict(), "facts": self.facts}, gan.step)
        self.saved = gan.step
        if self.evaluator.improved:
            self.run.link("best", path)
            self.evaluator.improved = False
        self.run.prune(self.keep)
        self.stats.pause(time.perf_counter() - started)


def _infinite(gan: GAN) -> Iterator[tuple[str, str]]:
    """Network and name of each weight or saved buffer with a value that is not finite."""
    for network, tensors in gan.weights().items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                yield network, key
