"""Other data, other networks, other plugins, other loops: where a regularizer that worked once breaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gankit import losses, networks
from gankit.attached import Attached, attach
from gankit.conformance.bench import (
    BATCH,
    KINDS,
    LATE,
    WARM,
    Z_DIM,
    Bench,
    Failed,
    Scene,
    Shaped,
    Skipped,
    close,
    default_dtype,
    expect,
    global_random,
    global_states,
    quiet,
    same,
    sentence,
    unequal,
    weights_of,
)
from gankit.contract import PHASES, Batch, View
from gankit.data.dataset import Dataset, Store
from gankit.errors import UsageError
from gankit.gan import Optim
from gankit.hookspecs import hookimpl
from gankit.loop import Critic, train
from gankit.plugins import ContractError, available, create, snake_case
from gankit.testing import Log

COMPANIONS: dict[str, dict[str, Any]] = {
    "spectral_norm": {},
    "gradient_penalty": {},
    "packing": {},
    "bigan": {},
    "lecam": {},
}
LOGITS = ((1,), (1, 1, 1), (1, 2, 2))


def works(what: str, kind: str, run: Callable[[], Any]) -> Any:
    """Run it; a refusal is fine (and None), any other exception is not, nor are terms that are not finite."""
    with quiet(), global_random(0):
        try:
            found = run()
        except ContractError as error:
            if "switch one of the two off" not in str(error):  # which is a refusal, too
                raise Failed(f"{what}, on {kind}s: {sentence(error)}") from error
            return None
        except UsageError:
            return None
        except Exception as error:
            raise Failed(f"{what}, on {kind}s: {sentence(error)}") from error
    if isinstance(found, Log):
        for phase, step, terms in found.updates:
            for name, value in terms.items():
                expect(
                    math.isfinite(value),
                    f"{what}, on {kind}s: the {phase.upper()} term {name!r} is {value} in step {step}",
                )
    return found


def _train(bench: Bench, kind: str, steps: int, **settings: Any) -> Log:
    log = Log()
    gan = bench.gan(kind, {bench.name: bench.plugin()}, core={"log": log, **settings.pop("core", {})}, **settings)
    train(gan, steps)
    return log


def batch_sizes(bench: Bench) -> None:
    """Batches of 1 and of 7 work, or are refused in a sentence.

    Mend: no standard deviation over one sample (``correction=0``), no ``squeeze()`` without a dimension; or refuse in
    ``setup``.
    """
    for kind in bench.kinds():
        for size in (1, 7):
            works(f"a batch of {size}", kind, lambda kind=kind, size=size: _train(bench, kind, 3, batch_size=size))  # type: ignore[misc]


def smaller_batch(bench: Bench) -> None:
    """A batch may be smaller than the ones before, as the last one of an epoch is.

    Mend: take the number of samples from the tensors at hand, ``len(real)``, not from ``gan.batch_size``.
    """
    for scene in bench.scenes(repeatable=False):
        works(f"a batch of 5 after batches of {BATCH}", scene.kind, lambda s=scene: s.play(s.real[:5], s.z[:5]))  # type: ignore[misc]


def logit_shapes(bench: Bench) -> None:
    """Logits (B, 1), (B, 1, 1, 1) and maps of equal logits give the terms that (B,) gives.

    Mend: no (B, 1) - (B,), which makes (B, B); average the logits of one sample first, by
    ``gankit.functional.logit_per_sample``.
    """
    for scene in bench.scenes():
        found = {name: t.item() for name, t in scene.play().items()}
        if scene.gan.players["discriminator"].module.__class__.__module__ != networks.__name__:
            continue  # the plugin's own
        with default_dtype(torch.float64):
            rows = len(scene.gan.first_view().real[0])  # which under packing are fewer than the samples
        for shape in LOGITS:

            def play(scene: Scene = scene, shape: tuple[int, ...] = shape) -> dict[str, float]:
                other = bench.scene(scene.kind, scene.phase, discriminator=shaped(shape))
                return {name: t.item() for name, t in other.play().items()}

            what = f"logits of shape {(rows, *shape)}"
            try:
                terms = works(what, scene.kind, play)
            except Skipped:
                continue
            for name, value in (terms or {}).items():
                expect(
                    close(value, found.get(name, value)),
                    f"{what} make the term {name!r} of {scene.where} {value:.6g} instead of {found.get(name, 0):.6g}",
                )


def shaped(shape: tuple[int, ...]) -> Callable[[Any], nn.Module]:
    """A factory of critics with logits (B, \\*shape); it has no ``shape`` by default, which a GAN's own would replace."""
    return lambda shapes: Shaped(networks.discriminator(shapes, width=8), shape)


class Conditional(nn.Module):
    """A critic of any arguments, whole numbers included."""

    def __init__(self, shapes: Sequence[Sequence[int]], norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        width = sum(math.prod(shape) for shape in shapes)
        self.layers = nn.Sequential(nn.Linear(width, 16), norm(16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, *inputs: Tensor) -> Tensor:
        """(B,)."""
        dtype = next(self.parameters()).dtype
        logits: Tensor = self.layers(torch.cat([t.reshape(len(t), -1).to(dtype) for t in inputs], dim=1))
        return logits.squeeze(1)


class Labels:
    """A core hook that shows the critic a code and a label beside each sample."""

    @hookimpl(wrapper=True, trylast=True)
    def view(self, batch: Batch) -> Generator[None, View, View]:
        """(x, z, y) on both sides."""
        view = yield
        code = batch.z.flatten(1)
        labels = torch.arange(len(code), device=code.device).remainder(3)[:, None]
        return View((*view.real, code, labels), (*view.fake, code, labels))


def several_inputs(bench: Bench) -> None:
    """A critic with further arguments, a code and a label of whole numbers, works or is refused in a sentence.

    Mend: call ``critic(*view.real)``; only floating tensors have slopes; mix or augment all of a sample's tensors as they
    need it and hand on the others.
    """
    for kind in bench.kinds():
        works(
            "a critic of (x, code, label)",
            kind,
            lambda kind=kind: _train(bench, kind, 3, core={"labels": Labels()}, discriminator=Conditional),  # type: ignore[misc]
        )


def refuses_batch_norm(bench: Bench) -> None:
    """Claimed per sample, and of slopes: a critic with batch norm, whose slopes mix the samples, is refused in ``setup``.

    Mend: ``gankit.checks.need_per_sample_critic(gan, "name")`` in ``setup``.
    """
    claims = bench.claims
    of_slopes = claims.double_backwards or claims.gradient_norm or claims.slopes
    if not (claims.per_sample and of_slopes):
        raise Skipped("its claims do not say per_sample of slopes")
    for kind in bench.kinds():
        for norm in (nn.Identity, nn.BatchNorm1d):
            try:
                with quiet():
                    bench.gan(kind, {bench.name: bench.plugin()}, discriminator=partial(Conditional, norm=norm))
            except UsageError:
                break  # a plugin that refuses both, or brings a critic of its own, refuses this one as well
        else:
            raise Failed(f"on {kind}s, a discriminator with batch norm is not refused")


def float64(bench: Bench) -> None:
    """In float64 the terms are float64.

    Mend: no ``dtype=torch.float32``, ``.float()`` or ``torch.FloatTensor``; ``dtype=x.dtype``.
    """
    for scene in bench.scenes(repeatable=False):
        for name, term in scene.play().items():
            expect(
                term.dtype == torch.float64,
                f"the term {name!r} of {scene.where} is {term.dtype} where all else is float64",
            )


def companions(bench: Bench) -> None:
    """Beside other plugins, before and after them, it trains or one of the two is refused in a sentence.

    Mend: take rows from what you are shown: under packing there are fewer logits than samples, in a joint view the critic
    has two arguments.
    """
    others = [name for name in COMPANIONS if name in available() and name != bench.name]
    if not others:
        raise Skipped("none of the plugins to combine it with is installed")
    kind = bench.kinds()[0]
    for name in others:
        for first in (True, False):

            def run(name: str = name, first: bool = first) -> Log:
                log, plugin = Log(), {bench.name: bench.plugin()}
                other = create([name], {name: COMPANIONS[name]})[0]
                gan = bench.gan(kind, {**plugin, **other} if first else {**other, **plugin}, core={"log": log})
                train(gan, WARM)
                return log

            works(f"{'before' if first else 'after'} {name}", kind, run)


def own_loop(bench: Bench) -> None:
    """In a loop of one's own, with ``gankit.attach``, it adds the terms it adds in gankit's, or is refused in a sentence.

    Mend: as the message says; look at arguments of the hook, not at the GAN, where both have it, and for rates at
    ``gan.optimizers``; ``post_step`` gets no term "adv" where a loop adds ``attached.d_terms`` to a loss of its own.
    """
    for kind in bench.kinds():
        wanted: Updates | None = None
        for name, route in ROUTES.items():
            what = f"with {name} of gankit.attach"
            found = works(what, kind, lambda kind=kind, route=route: _own_loop(bench, kind, route))  # type: ignore[misc]
            if found and wanted is None:
                wanted = works("on networks of one's own", kind, lambda kind=kind: _gankits_loop(bench, kind))  # type: ignore[misc]
            if found is None or wanted is None:  # refused
                continue
            updates = f"{len(found)} updates {what} on {kind}s, {len(wanted)} in gankit's own loop"
            expect(len(found) == len(wanted), f"{updates}: it stops one of the two")
            for (phase, step, terms), (*_, right) in zip(found, wanted, strict=True):
                where = f"{what}, on {kind}s, in step {step}"
                expect(
                    terms.keys() == right.keys(),
                    f"{where}: the {phase.upper()} terms are {', '.join(terms)}; in gankit's own loop {', '.join(right)}",
                )
                for term, value in terms.items():
                    expect(
                        close(value, right[term], 1e-4),
                        f"{where}: the {phase.upper()} term {term!r} is {value:.6g}; in gankit's own loop {right[term]:.6g}",
                    )


Updates = list[tuple[str, int, dict[str, float]]]
LR = 1e-3  # not the rate that a GAN has by itself, which says nothing of optimisers that are somebody's own


def _networks(bench: Bench, kind: str) -> tuple[nn.Module, nn.Module]:
    """G and D, always the same; D for what the plugin shows."""
    shown = bench.gan(kind, {bench.name: bench.plugin()}).first_view().real
    torch.manual_seed(0)
    g = networks.generator(KINDS[kind], Z_DIM, width=8)
    return g, networks.discriminator([t.shape[1:] for t in shown], width=8)


def _batches(kind: str) -> list[tuple[Tensor, Tensor]]:
    """Real samples and latents, for D and G in turns."""
    stream = torch.Generator().manual_seed(0)
    real = (torch.rand(BATCH, *KINDS[kind], generator=stream) * 2 - 1 for _ in range(2 * WARM))
    return [(x, torch.randn(BATCH, Z_DIM, generator=stream)) for x in real]


def _gankits_loop(bench: Bench, kind: str) -> Updates:
    plugin, log = bench.plugin(), Log()
    g, d = _networks(bench, kind)
    name = snake_case(type(plugin).__name__)  # as attach calls it, for its random stream
    gan = bench.gan(
        kind,
        {name: plugin},
        core={"log": log},
        generator=g,
        discriminator=d,
        architecture={},
        optim={phase: Optim(lr=LR) for phase in PHASES},
    )
    real, z = map(iter, zip(*_batches(kind), strict=True))
    gan.next_real, gan.next_z = real.__next__, z.__next__  # type: ignore[assignment, method-assign]
    train(gan, WARM)
    return log.updates


def _own_loop(bench: Bench, kind: str, route: Route) -> Updates:
    g, d = _networks(bench, kind)
    s = Optim(lr=LR)
    optimizers = {
        phase: torch.optim.Adam(m.parameters(), lr=s.lr, betas=s.betas, eps=s.eps, fused=True)
        for phase, m in (("d", d), ("g", g))
    }
    loss = losses.make(bench.loss(kind))
    attached = attach(g, d, [bench.plugin()], optimizers=optimizers, loss=loss, steps=LATE[-1])
    batches, updates = _batches(kind), []
    attached.setup(batches[0][0], *batches[0])
    for i, (real, z) in enumerate(batches):
        phase, fake = PHASES[i % 2], g(z)
        optimizers[phase].zero_grad()
        whole, adv = route(attached, d, phase, real, fake.detach() if phase == "d" else fake, z)
        whole.backward()  # type: ignore[no-untyped-call]
        optimizers[phase].step()
        terms = {**adv, **attached.terms[phase]}
        updates.append((phase, i // 2 + 1, {name: term.item() for name, term in terms.items()}))
    return updates


Route = Callable[[Attached, nn.Module, str, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
"""One way to a player's loss in a loop of one's own, and what of it attach does not know."""


def _whole(
    attached: Attached, d: nn.Module, phase: str, real: Tensor, fake: Tensor, z: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    return (attached.d_loss if phase == "d" else attached.g_loss)(real, fake, z), {}


def _of_shown(
    attached: Attached, d: nn.Module, phase: str, real: Tensor, fake: Tensor, z: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    shown = attached.show(real, fake, z, phase=phase)
    logits, adv = _adversarial(attached, shown.critic, phase, shown.real, shown.fake)
    added = attached.d_terms(shown, **logits) if phase == "d" else attached.g_terms(shown, g_loss=adv, **logits)
    return adv + added, {"adv": adv}


def _alone(
    attached: Attached, d: nn.Module, phase: str, real: Tensor, fake: Tensor, z: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    if phase == "d":  # before anything is scored, which is refused where D is for other shapes
        added = attached.d_terms(real, fake, z)
    _, adv = _adversarial(attached, d, phase, (real,), (fake,))
    if phase == "g":
        added = attached.g_terms(real, fake, z, g_loss=adv)
    return adv + added, {"adv": adv}


def _adversarial(
    attached: Attached, critic: Critic, phase: str, real: tuple[Tensor, ...], fake: tuple[Tensor, ...]
) -> tuple[dict[str, Tensor], Tensor]:
    """Logits of the sides that the loss needs, and the loss."""
    sides = {"real_logits": real, "fake_logits": fake}
    logits = {name: critic(*sides[name]) for name in (sides if phase == "d" else attached.loss.g_sides)}
    return logits, attached.loss.d(*logits.values()) if phase == "d" else attached.loss.g(**logits)


ROUTES: dict[str, Route] = {
    "d_loss and g_loss": _whole,
    "show, and d_terms and g_terms of what it shows,": _of_shown,
    "d_terms and g_terms": _alone,
}


def players(bench: Bench) -> None:
    """Networks it brings begin elsewhere with another seed, are trained, and have names of their own.

    Mend: initialise from torch's global generator, which the core has seeded; use the network in a term, a view or a batch.
    """
    if not bench.has("players"):
        raise Skipped("it brings no networks")
    for kind in bench.kinds():
        with quiet(), global_random(0):
            gan, twin = (bench.gan(kind, {bench.name: bench.plugin()}, seed=seed) for seed in (0, 1))
            shipped = {"generator", "discriminator"}
            start = {name: [p.clone() for p in gan.players[name].module.parameters()] for name in gan.players}
            for name in set(gan.players) - shipped:
                pairs = [*zip(start[name], twin.players[name].module.parameters(), strict=True)]
                random = [not torch.equal(a, b) for a, b in pairs]
                expect(not pairs or any(random), f"on {kind}s, the {name} begins the same whatever the seed")
            train(gan, WARM)
        for name in set(gan.players) - shipped:
            pairs = [*zip(start[name], gan.players[name].module.parameters(), strict=True)]
            moved = any(not torch.equal(a, b) for a, b in pairs)
            expect(not pairs or moved, f"on {kind}s, the {name} is not trained: it is as it was after {WARM} steps")


def metrics(bench: Bench) -> None:
    """``evaluate`` gives numbers, the same for the same samples, and leaves training alone; names are its own.

    Mend: draw with ``draw(n)``; random numbers of a metric from ``torch.Generator().manual_seed(...)``.
    """
    from gankit.training import measure

    if not bench.has("evaluate"):
        raise Skipped("it has no metrics")
    for kind in bench.kinds():
        with quiet(), global_random(0):
            gan = bench.gan(kind, {bench.name: bench.plugin()})
            gan.data = _noise(gan.shape)
            train(gan, 1)
            before = {name: rng.get_state() for name, rng in gan.rngs.items() if not name.startswith("plugin:")}
            weights, states = weights_of(gan), global_states()
            try:
                one, two = measure(gan), measure(gan)
            except UsageError as error:
                raise Skipped(f"it refuses: {error}") from error
            except Exception as error:
                raise Failed(f"on {kind}s: {sentence(error)}") from error
            drawn = [name for name, state in global_states().items() if state != states[name]]
            expect(not drawn, f"on {kind}s, measuring advances {drawn[:1]}")
        expect(same(one, two), f"on {kind}s, the same samples give {one}, and then {two}")
        for name in one:
            expect(name not in BUILT_IN, f"the metric {name!r} has the name of one of gankit's own")
        moved = [
            name for name, rng in gan.rngs.items() if name in before and not torch.equal(rng.get_state(), before[name])
        ]
        expect(not moved, f"on {kind}s, measuring advances the stream {moved[:1]}")
        changed = unequal(weights, weights_of(gan))
        expect(not changed, f"on {kind}s, measuring changes the networks, first in {changed!r}")


BUILT_IN = (
    "modes", "high_quality", "reverse_kl", "jsd", "kl_to_truth", "worst_share_ratio", "rare_share", "sliced_wasserstein",
    "energy_distance", "step",
)  # fmt: skip


def _noise(shape: tuple[int, ...]) -> Dataset:
    stream = torch.Generator().manual_seed(0)
    train, test = (Store(torch.rand(64, *shape, generator=stream) * 2 - 1) for _ in range(2))
    return Dataset("noise", train, test)
