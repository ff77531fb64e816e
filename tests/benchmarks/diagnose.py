"""Hit and false-alarm rates of ``gankit diagnose``, on seeded runs made to fail in a known way or to stay healthy.

    python tests/benchmarks/diagnose.py [--only healthy,sorted] [--write]

Each of the FAMILIES is trained with every seed, in this process, on one thread. What a run logged (the rows that the rules
read) and what is true of it go to tests/benchmarks/diagnose.json.gz, run by run, so that an interrupted measurement
continues. The truth comes from elsewhere than the rows: from how the run was made, and from the known modes, fresh samples
of the true distribution, and the gradients that the optimisers were given.

Thresholds were chosen on even seeds; the printed rates, and with --write those in docs/diagnose.md, are of odd seeds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gankit import diagnose as rules
from gankit import losses, networks
from gankit.config import Config
from gankit.data import Dataset, from_arrays
from gankit.errors import Diverged
from gankit.files import write_atomic
from gankit.gan import GAN, Latent, Optim
from gankit.hookspecs import hookimpl
from gankit.loop import train
from gankit.plugins import create
from gankit.sampler import Sampler
from gankit.signals import Signals
from gankit.training import Averaging, LinearDecay, Stats, measure

ROOT = Path(__file__).parents[2]
STORE = Path(__file__).with_suffix(".json.gz")
UNREAD = ("n", "m", "rank", "real_logits", "held_out_logits", "fake_logits")
PAGE = ROOT / "docs" / "diagnose.md"
MARK = re.compile(r"<!-- measured -->\n.*?<!-- end -->", re.DOTALL)

SEEDS = 10
STEPS, EVALUATIONS = 500, 10
YOUTH = "poor samples"  # so few steps are too few for most of the runs
COUNT = 4000
FRESH = 2000


# -- data whose modes are known -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """Clusters of equal weight: ``draw(n, generator)`` gives samples (n, \\*shape) and their modes (n,)."""

    centers: Tensor  # (K, *shape)
    std: float

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """True samples, and which mode each is of."""
        modes = torch.randint(len(self.centers), (n,), generator=generator)
        noise = torch.randn(n, *self.centers.shape[1:], generator=generator)
        return self.centers[modes] + self.std * noise, modes

    def shares(self, samples: Tensor) -> list[float]:
        """Share of samples by nearest centre."""
        nearest = torch.cdist(samples.flatten(1), self.centers.flatten(1)).argmin(dim=1)
        return (torch.bincount(nearest, minlength=len(self.centers)) / len(samples)).tolist()

    def off(self, samples: Tensor) -> Tensor:
        """How far each sample is from where the data are: from the nearest centre."""
        return torch.cdist(samples.flatten(1), self.centers.flatten(1)).amin(dim=1)


class Annulus(Mixture):
    """No clusters at all: a ring of even density; its eight sectors are counted as modes."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """True samples and their sectors."""
        angle = 2 * math.pi * torch.rand(n, generator=generator)
        radius = 1 + self.std * torch.randn(n, generator=generator)
        samples = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        return samples, torch.cdist(samples, self.centers).argmin(dim=1)

    def off(self, samples: Tensor) -> Tensor:
        """How far each sample is from the circle."""
        return (samples.norm(dim=1) - 1).abs()


def ring(modes: int, radius: float = 1.0) -> Tensor:
    """Centres on a circle."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def glyphs(count: int, side: int = 12) -> Tensor:
    """Smooth random pictures (count, 1, side, side) within [-0.9, 0.9]."""
    coarse = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    return 0.9 * torch.nn.functional.interpolate(2 * coarse, size=side, mode="bicubic").tanh()


axis = torch.arange(-4.0, 5.0, 2.0)
DATA: dict[str, Mixture] = {
    "ring": Mixture(ring(8), 0.03),
    "grid": Mixture(torch.cartesian_prod(axis, axis), 0.1),
    "sixteen": Mixture(2 * torch.randn(10, 16, generator=torch.Generator().manual_seed(4)), 0.3),
    "images": Mixture(glyphs(6), 0.05),
    "annulus": Annulus(ring(8), 0.05),
}
IN_TURN = list(DATA)


# -- runs that fail in a known way -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way to train. Everything else is the same for all: small MLPs, Adam, averaging, rates that decay."""

    plugins: tuple[str, ...] = ()
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    loss: str = "non_saturating"
    lr_g: float = 2e-3
    lr_d: float = 3e-3
    beta1: float = 0.0
    d_steps: int = 1
    steps: int = STEPS
    count: int = COUNT
    width: int = 32
    data: tuple[str, ...] = tuple(IN_TURN)
    order: str = "shuffled"  # "sorted": one mode for a while, then the next; "first": the first mode alone
    labelled: bool = False
    network: Callable[[nn.Module, Mixture], nn.Module] | None = None  # changes the generator
    z_dim: int | None = None
    critic: Callable[[nn.Module], nn.Module] | None = None  # changes the discriminator
    extra: type | None = None  # one more plugin


class Deaf(nn.Module):
    """A generator that ignores its latents."""

    def __init__(self, inner: nn.Module, mixture: Mixture) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> Tensor:
        """The same sample for every z."""
        made: Tensor = self.inner(0 * z)
        return made


class Dull(nn.Module):
    """A generator that hardly hears its latents."""

    def __init__(self, inner: nn.Module, mixture: Mixture) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> Tensor:
        """Samples near one point."""
        made: Tensor = self.inner(1e-3 * z)
        return made


class Knowing(nn.Module):
    """A generator that makes the true distribution, but for a shift that it learns."""

    def __init__(self, inner: nn.Module, mixture: Mixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.shift = nn.Parameter(torch.zeros(mixture.centers.shape[1:]))

    def forward(self, z: Tensor) -> Tensor:
        """The first coordinate chooses the mode, the others are the noise."""
        share = torch.special.ndtr(z[:, 0])
        modes = (share * len(self.mixture.centers)).long().clamp(0, len(self.mixture.centers) - 1)
        noise = z[:, 1:].view(len(z), *self.mixture.centers.shape[1:])
        return self.mixture.centers[modes] + self.mixture.std * noise + self.shift


def dead(inner: nn.Module) -> nn.Module:
    """A discriminator whose hidden units are all off for every input."""
    *hidden, _ = [module for module in inner.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for module in hidden:
            module.bias.fill_(-1000.0)
    return inner


class Blind(nn.Module):
    """An encoder that draws a latent without looking at its sample."""

    def __init__(self, z_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(z_dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, \\*shape) -> (B, z_dim)."""
        return self.scale * torch.randn(len(x), len(self.scale))


def blind(shape: tuple[int, ...], z_dim: int) -> nn.Module:
    """The factory of `Blind`."""
    return Blind(z_dim)


@dataclass(eq=False)
class Spoiler:
    """A term that is not a number from some step on, as from the square root of a negative number."""

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor, step: int) -> dict[str, Tensor]:
        """0 until step 300."""
        return {"spoiler": 1e-6 * (300 - step - real_logits.square().mean()).sqrt()}


@dataclass(eq=False)
class Louder:
    """A term that grows by a factor every step: the loss explodes."""

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor, fake_logits: Tensor, step: int) -> dict[str, Tensor]:
        """Rewards large logits more and more."""
        return {"louder": 1.05 ** min(step, 400) * (fake_logits.mean() - real_logits.mean())}


R1 = {"r1": {"weight": 1}}
BLIND = {"encoder": f"{__file__}:blind"}
FAMILIES: dict[str, Case] = {
    # made to stay healthy
    "r1": Case(("r1",), R1),
    "r2": Case(("r2",), {"r2": {"weight": 1}}),
    "gradient_penalty": Case(("gradient_penalty",), {"gradient_penalty": {"weight": 1}}),
    "spectral_norm": Case(("spectral_norm",)),
    "r3gan": Case(("r1", "r2"), {"r1": {"weight": 0.1}, "r2": {"weight": 0.1}}, loss="relativistic"),
    "wgan_gp": Case(("gradient_penalty",), {"gradient_penalty": {"weight": 1}}, loss="wasserstein", d_steps=2),
    "hinge_sn": Case(("spectral_norm",), loss="hinge"),
    "least_squares_r1": Case(("r1",), R1, loss="least_squares"),
    "one_class_of_data": Case(("r1",), R1, labelled=True, order="only"),
    "labelled": Case(("r1",), R1, labelled=True, data=("ring", "sixteen", "images", "ring", "images")),
    # as people do it; what becomes of them is for the truth to say
    "plain": Case(),
    "plain_momentum": Case(beta1=0.5),
    "packing": Case(("packing",)),
    # made to fail
    "g_rate_high": Case(lr_g=3e-2),
    "d_rate_low": Case(lr_d=1e-4, lr_g=5e-3),
    "momentum": Case(beta1=0.95, lr_g=1e-2, lr_d=1e-2),
    "d_too_strong": Case(loss="saturating", lr_g=2e-5, lr_d=5e-3, d_steps=4),
    "d_too_strong_hinge": Case(loss="hinge", lr_g=2e-5, lr_d=5e-3, d_steps=4),
    "d_frozen": Case(lr_d=0.0),
    "g_frozen": Case(("r1",), R1, lr_g=0.0),
    "both_frozen": Case(lr_d=0.0, lr_g=0.0),
    "rate_absurd": Case(lr_g=1e3, lr_d=1e3, loss="wasserstein"),
    "rate_more_absurd": Case(lr_g=1e6, lr_d=1e6, loss="least_squares"),
    "not_a_number": Case(("r1",), R1, extra=Spoiler),
    "unbounded": Case(loss="wasserstein", lr_d=3e-2, lr_g=1e-4, d_steps=4),
    "louder": Case(extra=Louder),
    "few_samples": Case(count=200, width=64, d_steps=2, data=("images", "sixteen")),
    "few_samples_known": Case(count=100, width=64, d_steps=2, lr_g=1e-4, data=("sixteen",), network=Knowing, z_dim=17),
    "more_samples_known": Case(count=300, width=96, d_steps=3, lr_g=1e-4, data=("sixteen",), network=Knowing, z_dim=17),
    "deaf": Case(("r1",), R1, network=Deaf),
    "dull": Case(network=Dull),
    "one_label": Case(("r1",), R1, labelled=True, order="first", data=("ring", "grid", "sixteen", "images", "ring")),
    "sorted": Case(order="sorted"),
    "dead_d": Case(critic=dead),
    # more of what is rare above
    "dead_d_hinge": Case(critic=dead, loss="hinge"),
    "far_behind": Case(loss="saturating", lr_g=1e-6, lr_d=1e-2, d_steps=2),
    "one_label_gp": Case(
        ("gradient_penalty",),
        {"gradient_penalty": {"weight": 1}},
        labelled=True,
        order="first",
        data=("images", "grid"),
    ),
    "few_samples_known_hinge": Case(
        count=150, width=64, d_steps=2, lr_g=1e-4, loss="hinge", data=("sixteen",), network=Knowing, z_dim=17
    ),
    # with an encoder
    "bigan": Case(("bigan",)),
    "bigan_r1": Case(("bigan", "r1"), R1),
    "bigan_many_latents": Case(("bigan", "r1"), R1, z_dim=32),
    "bigan_stochastic": Case(("bigan", "r1"), R1 | {"bigan": {"stochastic": True}}),
    "pairwise_gp": Case(("pairwise_gp",), {"pairwise_gp": {"weight": 1}}),
    "pairwise_gp_stochastic": Case(("pairwise_gp",), {"pairwise_gp": {"weight": 1, "stochastic": True}}),
    "veegan": Case(("veegan",)),
    "veegan_r1": Case(("veegan", "r1"), R1),
    "blind": Case(("bigan", "r1"), R1 | {"bigan": BLIND}),
    "blind_pairwise_gp": Case(("pairwise_gp",), {"pairwise_gp": {"weight": 1} | BLIND}),
    # long enough for samples that are near the data
    "r1_long": Case(("r1",), R1, steps=4000),
    "r3gan_long": Case(("r1", "r2"), {"r1": {"weight": 0.1}, "r2": {"weight": 0.1}}, loss="relativistic", steps=4000),
    "spectral_norm_long": Case(("spectral_norm",), steps=4000),
    "plain_long": Case(steps=4000),
}


def data_of(family: str, seed: int) -> tuple[str, Mixture, Dataset, Callable[[int], Tensor]]:
    """Name and distribution of a run's data, the data set, and the true batch at a step."""
    case = FAMILIES[family]
    turn = list(FAMILIES).index(family) + seed // 2  # so that even and odd seeds have the same data
    name = case.data[turn % len(case.data)]
    mixture = DATA[name]
    if case.order == "only":
        mixture = Mixture(mixture.centers[:1], mixture.std)
    x, modes = mixture.draw(case.count, torch.Generator().manual_seed(seed))
    data = from_arrays(name, x.numpy(), modes.numpy() if case.labelled else None)
    kept = data.batch(torch.arange(len(data)))
    modes = torch.cdist(kept.flatten(1), mixture.centers.flatten(1)).argmin(dim=1)
    sampler = Sampler(data, 64, torch.Generator().manual_seed(seed))
    stream = torch.Generator().manual_seed(seed)

    def batch(step: int) -> Tensor:
        if case.order in ("shuffled", "only"):
            return sampler()
        mode = step // 25 % len(mixture.centers) if case.order == "sorted" else 0
        rows = (modes == mode).nonzero().flatten()
        return data.batch(rows[torch.randint(len(rows), (64,), generator=stream)])

    return name, mixture, data, batch


class Witness:
    """The gradients that the optimisers were given, in size, and the losses, both by phase and update."""

    def __init__(self) -> None:
        self.sizes: dict[str, list[float]] = {"d": [], "g": []}
        self.losses: dict[str, list[float]] = {"d": [], "g": []}

    def watch(self, gan: GAN) -> None:
        """Look on before every optimiser step."""
        for phase, optimizer in gan.optimizers.items():
            optimizer.register_step_pre_hook(lambda o, *_, phase=phase: self.sizes[phase].append(self.size(o)))

    @hookimpl
    def post_step(self, terms: dict[str, Tensor], phase: str) -> None:
        """Keep the loss."""
        self.losses[phase].append(sum(term.item() for term in terms.values()))

    def judged(self) -> dict[str, float]:
        """Sizes over the last tenth of the updates, and how far losses moved in the second half."""
        found = {f"{phase}_gradient": _mean(sizes[-max(1, len(sizes) // 10) :]) for phase, sizes in self.sizes.items()}
        for phase, values in self.losses.items():
            late = values[len(values) // 2 :]
            found[f"{phase}_range"] = (max(late) - min(late)) / max(1.0, abs(_mean(late))) if late else math.nan
        return found

    @staticmethod
    def size(optimizer: torch.optim.Optimizer) -> float:
        """Root mean square over the weights."""
        given = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        count = sum(g.numel() for g in given)
        return math.sqrt(sum(g.double().square().sum().item() for g in given) / max(1, count))


def run(family: str, seed: int) -> dict[str, Any]:
    """Train one case: its rows, and the truth about it."""
    case = FAMILIES[family]
    torch.manual_seed(seed)  # for `Blind`
    name, mixture, data, batch = data_of(family, seed)
    rows: dict[str, list[dict[str, Any]]] = {"signals": [], "stats": []}
    plugins, _ = create(case.plugins, case.options)
    if case.extra:
        plugins["extra"] = case.extra()
    witness = Witness()
    core = {
        "witness": witness,
        "averaging": Averaging(0.98),
        "decay": LinearDecay(0.5, case.steps, 0.2),
        "stats": Stats(case.steps // 20, rows["stats"].append),
        "signals": Signals(data, rows["signals"].append),
    }

    def generator(shape: tuple[int, ...], z_dim: int) -> nn.Module:
        made = networks.generator(shape, z_dim, network="mlp", width=case.width, depth=2)
        return case.network(made, mixture) if case.network else made

    def discriminator(shapes: tuple[tuple[int, ...], ...]) -> nn.Module:
        made = networks.discriminator(shapes, network="mlp", width=case.width, depth=2)
        return case.critic(made) if case.critic else made

    gan = GAN(
        generator, discriminator, data.shape, Latent(case.z_dim or (8 if data.is_image else 4)), losses.make(case.loss),
        plugins=plugins, core=core, seed=seed, d_steps=case.d_steps, batch_size=64,
        optim={"d": Optim(case.lr_d, (case.beta1, 0.99)), "g": Optim(case.lr_g, (case.beta1, 0.99))},
    ).build()  # fmt: skip
    gan.next_real = lambda: batch(gan.step)
    witness.watch(gan)
    seen: list[dict[str, Any]] = []
    diverged = False
    measure(gan, truth=data)
    try:
        for part in range(1, EVALUATIONS + 1):
            train(gan, part * case.steps // EVALUATIONS)
            measure(gan)
            seen.append(look(gan, mixture, data))
    except Diverged:
        diverged = True
        rows["signals"].append({"step": gan.step, "diverged": "a term is not finite"})
    truth = {"diverged": diverged, **judged(seen), **witness.judged()}
    stats = [{key: row[key] for key in ("step", "d_loss", "g_loss")} for row in rows["stats"]]
    return _rounded(
        {"family": family, "seed": seed, "data": name, "truth": truth, "signals": rows["signals"], "stats": stats}
    )


@torch.no_grad()
def look(gan: GAN, mixture: Mixture, data: Dataset) -> dict[str, Any]:
    """What is true of the networks now, by samples that nothing else uses."""
    stream = torch.Generator().manual_seed(99)
    z = gan.latent.draw(FRESH, stream)
    made, now = gan.averages["generator"].eval()(z), gan.generator(z)
    fresh, modes = mixture.draw(FRESH, stream)
    seen: dict[str, Any] = {
        "made": mixture.shares(made),
        "now": mixture.shares(now),
        "near": (mixture.off(made) <= mixture.off(fresh).quantile(0.99)).double().mean().item(),
        "width": (made.flatten(1).var(dim=0).sum() / fresh.flatten(1).var(dim=0).sum()).sqrt().item(),
        "weights": {phase: torch.cat([p.flatten().clone() for p in gan.parameters(phase)]) for phase in "dg"},
    }
    encoder = gan.players.get("encoder") or gan.players.get("reconstructor")
    if encoder:
        codes = encoder.module.eval()(fresh)[:, : gan.latent.dim]  # the mean, of one that draws
        encoder.module.train()
        back = gan.averages["generator"](codes).flatten(1)
        seen["strayed"] = (torch.cdist(back, mixture.centers.flatten(1)).argmin(dim=1) != modes).double().mean().item()
    elif "packing" not in gan.plugins:  # critics that take pairs
        known = data.batch(torch.arange(min(len(data), FRESH)))
        d = gan.discriminator.eval()  # spectral norm's vectors stay
        scores = {name: d(x).double() for name, x in (("fresh", fresh), ("now", now), ("known", known))}
        d.train()
        seen["separated"] = _accuracy(scores["fresh"], scores["now"])
        seen["memorised"] = _accuracy(scores["known"], scores["fresh"])
    return seen


def judged(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """The truth in numbers: at the end, or over the second half of the evaluations."""
    if not seen:
        return {}
    last, late = seen[-1], seen[len(seen) // 2 :]
    steps = list(pairwise(late))
    due = 1 / len(last["made"])
    return {
        "modes": len(last["made"]),
        "lost": sum(share < due / 10 for share in last["made"]),
        "top": max(last["made"]),
        "width": last["width"],
        "near": max(x["near"] for x in seen[-3:]),
        "path": _mean([sum(abs(a - b) for a, b in zip(x["now"], y["now"], strict=True)) / 2 for x, y in steps]),
        "separated": min(x.get("separated", 0.5) for x in seen[-3:]),
        "memorised": last.get("memorised", 0.5),
        **({"strayed": min(x["strayed"] for x in seen[-3:])} if "strayed" in last else {}),
        **{
            f"{phase}_moved": max(
                (
                    ((x - y).norm() / y.norm()).item()
                    for a, b in steps
                    for x, y in [(a["weights"][phase], b["weights"][phase])]
                ),
                default=math.nan,
            )
            for phase in "dg"
        },
    }


def _accuracy(high: Tensor, low: Tensor) -> float:
    """Of the best threshold that calls ``high`` what lies above it: mean of both sides' shares."""
    values = torch.cat([high, low])
    sides = torch.cat([torch.full((len(high),), 1 / len(high)), torch.full((len(low),), -1 / len(low))])
    order = values.argsort(descending=True, stable=True)
    if not values.isfinite().all():
        return 0.5
    sums = sides.double()[order].cumsum(0)
    last = torch.cat([values[order].diff() != 0, torch.ones(1, dtype=torch.bool)])  # between different values only
    return 0.5 + max(0.0, float(sums[last].max())) / 2


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _rounded(value: Any, digits: int = 4) -> Any:
    if isinstance(value, dict):  # whether a norm or a loss has changed at all shows in its last digits
        fine = {"norm": 12, "loss": 7}
        return {key: _rounded(item, fine.get(key[2:], 4)) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


# -- rates ---------------------------------------------------------------------------------------------------------


def truths(row: dict[str, Any]) -> dict[str, bool]:
    """What is true of a run, by finding; findings of which nothing is known are left out."""
    known, case = row["truth"], FAMILIES[row["family"]]
    found = {"not finite": known["diverged"]}
    if any(value is None for value in (known["d_gradient"], known["g_gradient"])) or "modes" not in known:
        return found  # it ended in numbers that are none
    found["collapse"] = known["width"] < 0.2
    found["lost modes"] = known["modes"] > 1 and known["lost"] >= known["modes"] / 10
    if case.labelled:
        found["one class"] = known["modes"] > 1 and known["top"] >= 0.95
    found["oscillation"] = known["path"] >= 0.3
    if "strayed" in known:
        found["poor inverse"] = known["strayed"] >= 0.5 and known["lost"] < 0.4 * known["modes"]
    elif "packing" not in case.plugins and case.loss != "wasserstein":
        found["saturated D"] = known["separated"] >= 0.99
        found["overfitted D"] = known["memorised"] >= 0.75
    found["frozen network"] = min(known["g_moved"], known["d_moved"]) < 1e-9
    found["flat losses"] = max(known["g_range"], known["d_range"]) < 1e-5
    found["vanishing gradient"] = known["g_gradient"] < 1e-6
    found["exploding"] = max(known["g_gradient"], known["d_gradient"]) >= 10
    found["poor samples"] = known["near"] < 0.5
    return found


def record(row: dict[str, Any], until: float = math.inf) -> rules.Record:
    """What gankit would have logged of a run up to a step."""
    case = FAMILIES[row["family"]]
    config = Config(
        plugin=case.plugins, loss=case.loss, steps=case.steps, batch=64, lr_g=case.lr_g, lr_d=case.lr_d, beta1=case.beta1,
        d_steps=case.d_steps, seed=row["seed"],
    )  # fmt: skip
    signals, stats = ([r for r in row[name] if (r["step"] or 0) <= until] for name in ("signals", "stats"))
    return rules.Record(config, signals, (), stats)


Outcomes = list[tuple[str, bool]]  # the kind of a run, and what became of it


def wilson(outcomes: Outcomes) -> str:
    """A rate with its 95 % interval (Wilson 1927), as if the runs of one kind, which resemble each other, were one."""
    if not outcomes:
        return "-"
    runs, hits, n = len(outcomes), sum(hit for _, hit in outcomes), len({kind for kind, _ in outcomes})
    z, p = 1.96, hits / runs
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return f"{hits} of {runs}: {p:.0%} ({max(0.0, low):.0%} to {min(1.0, high):.0%})"


def table(rows: list[dict[str, Any]]) -> str:
    """Rates of hits and false alarms by finding, and of runs in which nothing is wrong, on these runs."""
    hits: dict[str, Outcomes] = {name: [] for name in rules.RULES}
    alarms: dict[str, Outcomes] = {name: [] for name in rules.RULES}
    words: dict[str, Outcomes] = {word: [] for word in reversed(rules.WORDS.values())}
    healthy: Outcomes = []
    warned: Outcomes = []
    for row in rows:
        true = truths(row)
        found = {finding.name: finding for finding in rules.diagnose(record(row)).findings}
        for name, is_true in true.items():
            (hits if is_true else alarms)[name].append((row["family"], name in found))
            if name in found:
                words[found[name].word].append((row["family"], is_true))
        if not any(is_true for name, is_true in true.items() if name != YOUTH):
            healthy.append((row["family"], bool(found.keys() - {YOUTH})))
            steps = [r["step"] for r in row["signals"] if r["step"]]
            seen = (f for s in steps for f in rules.diagnose(record(row, s)).findings if f.name != YOUTH)
            warned.append((row["family"], any(map(rules.worth_a_warning, seen))))
    lines = ["| finding | hits, of runs that have it | false alarms, of runs that have it not |", "|---|---|---|"]
    lines += [f"| {name} | {wilson(hits[name])} | {wilson(alarms[name])} |" for name in hits]
    lines += ["", "| how sure | right |", "|---|---|"]
    lines += [f"| {word} | {wilson(right)} |" for word, right in words.items()]
    lines += [
        "",
        f"Runs of which nothing of this is true, {YOUTH} aside, and any other finding at the end: {wilson(healthy)};",
    ]
    lines += [f"a live warning at any evaluation: {wilson(warned)}."]
    return "\n".join(lines)


def report(rows: list[dict[str, Any]]) -> str:
    """The page's block: what was measured on the seeds that no threshold was chosen on."""
    odd = [row for row in rows if row["seed"] % 2]
    return (
        f"{len(rows)} runs of {len(FAMILIES)} kinds; thresholds were chosen on the {len(rows) - len(odd)} of even seeds, "
        f"and this is measured on the {len(odd)} of odd ones. In brackets: 95 % intervals (Wilson), "
        f"in which the runs of one kind, which resemble each other, count as one.\n\n{table(odd)}"
    )


def load(store: Path = STORE) -> list[dict[str, Any]]:
    """The measured runs."""
    found: list[dict[str, Any]] = json.loads(gzip.decompress(store.read_bytes())) if store.exists() else []
    return found


def save(rows: list[dict[str, Any]], store: Path) -> None:
    """Write the measured runs, without the columns that no rule reads."""
    kept = [
        {**row, "signals": [{k: v for k, v in r.items() if k not in UNREAD} for r in row["signals"]]} for row in rows
    ]
    write_atomic(store, gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), mtime=0))


def main() -> None:
    """Measure what is missing, print the rates, and write the page's table if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="families, by comma")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument(
        "--tuning", action="store_true", help="print the rates of even seeds, too, and each mistake there"
    )
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = load(options.store)
    done = {(row["family"], row["seed"]) for row in rows}
    families = options.only.split(",") if options.only else list(FAMILIES)
    for seed in range(options.seeds):
        for family in families:
            if (family, seed) not in done:
                rows.append(run(family, seed))
                save(rows, options.store)
                print(family, seed, flush=True)
    if options.tuning:
        even = [row for row in rows if row["seed"] % 2 == 0]
        for row in even:
            found = {finding.name: finding.word for finding in rules.diagnose(record(row)).findings}
            wrong = [name for name, is_true in truths(row).items() if is_true != (name in found)]
            if wrong:
                print(row["family"], row["seed"], row["data"], {name: found.get(name, "missed") for name in wrong})
        print(table(even))
    print(report(rows))
    if options.write:
        made = f"<!-- measured -->\n{report(rows)}\n<!-- end -->"
        PAGE.write_text(MARK.sub(lambda match: made, PAGE.read_text(), count=1))


if __name__ == "__main__":
    main()
