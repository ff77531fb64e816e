"""Promises kept: closed forms on critics whose slopes are known, costs, means over samples, no memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gankit.conformance.bench import (
    KINDS,
    STEP,
    TERM_HOOKS,
    WARM,
    Bench,
    Scene,
    Skipped,
    close,
    default_dtype,
    expect,
    global_random,
    quiet,
)
from gankit.conformance.state import walk
from gankit.contract import Batch, View, watched
from gankit.gan import GAN, call_with_accepted
from gankit.loop import train

EARLY = 3  # where a weight that changes over steps is another one
STREAMS = 40  # over which random terms are averaged
MOVED = 10.0  # by which samples that lie near 0 come to lie elsewhere, as spread out as before
NORMS = (0.0, 0.3, 1.0, 1.7, 2.0, 3.0, 0.5, 4.0)


class Slopes:
    """D(x_i) = w_i . x_i: the gradient of the i-th logit is w_i, wherever it is taken."""

    def __init__(self, w: Tensor) -> None:
        self.w = w.requires_grad_()

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        """(B,)."""
        w = self.w[torch.arange(len(x)) % len(self.w)]
        return (w * x).flatten(1).sum(1)


class Bowl:
    """D(x) = a/2 ||x||^2 with a = 1: the gradient is x itself."""

    def __init__(self) -> None:
        self.a = torch.ones((), requires_grad=True)

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        """(B,)."""
        return self.a * x.flatten(1).square().sum(1) / 2


class Valley:
    """D(x) = (w . x)^2 / 2: the gradient is w wherever w . x = 1."""

    def __init__(self, w: Tensor) -> None:
        self.w = w.requires_grad_()

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        """(B,)."""
        return (self.w * x).flatten(1).sum(1).square() / 2


class Known:
    """D(x) = l_i + w_i . (x - x_i) for the nearest of some points x_i: any logits and slopes at them."""

    def __init__(self, points: Tensor, logits: Tensor, w: Tensor) -> None:
        self.points, self.logits, self.w = points, logits.requires_grad_(), w.requires_grad_()

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        """(B,)."""
        i = torch.cdist(x.detach().flatten(1), self.points.flatten(1)).argmin(1)
        return self.logits[i] + (self.w[i] * (x - self.points[i])).flatten(1).sum(1)


class Toy:
    """The plugin's D terms on critics that are functions, not networks, in float64."""

    def __init__(self, bench: Bench, kind: str) -> None:
        with quiet(), global_random(0):
            self.plugin = bench.plugin()
            self.gan: GAN = bench.gan(kind, {bench.name: self.plugin})
            train(self.gan, WARM)
        registered = self.gan.manager.get_plugins()
        self.hook = self.gan.manager.subset_hook_caller("pre_d_loss", registered - {self.plugin})

    def term(
        self,
        critic: Callable[..., Tensor],
        real: Tensor,
        fake: Tensor,
        seed: int = 0,
        step: int = STEP,
        **logits: Tensor,
    ) -> Tensor:
        """The sum of its terms."""
        self.gan.rng(self.plugin).manual_seed(seed)
        with quiet(), global_random(0), default_dtype(torch.float64):
            view = watched(View((real,), (fake,)))
            z = self.gan.latent.draw(len(real), torch.Generator().manual_seed(0))
            known: dict[str, Any] = {"critic": critic, "batch": Batch(real, fake, z), "view": view}
            known |= logits or {"real_logits": critic(*view.real), "fake_logits": critic(*view.fake)}
            found = self.hook(gan=self.gan, step=step, ahead=False, **known)
        values = [term for terms in found for term in terms.values()]
        if not values:
            raise Skipped("it has no D term with these options")
        return torch.stack(values).sum()

    def said(self, claim: Callable[..., Tensor], *values: Tensor, step: int = STEP) -> Tensor:
        """What a claim makes of these values."""
        found: Tensor = call_with_accepted(partial(claim, self.plugin, *values), step=step, steps=self.gan.steps)
        return found


def toys(bench: Bench) -> list[tuple[str, Toy]]:
    """One for each kind of data."""
    return [(kind, bench.once(("toy", kind), lambda kind=kind: Toy(bench, kind))) for kind in bench.kinds()]  # type: ignore[misc]


def unit(n: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """(n, \\*shape) random rows of length 1, float64."""
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / rows(x.flatten(1).norm(dim=1), x)


def rows(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1)."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def claimed_norm(bench: Bench) -> None:
    """Claimed a function of the gradient's norm: the mean over samples of that function, for any slopes, 0 included.

    Mend: the norm over all dimensions but the first, one per sample; then the function; then the mean.
    """
    f = bench.claims.gradient_norm
    if f is None:
        raise Skipped("its claims do not give gradient_norm")
    for kind, toy in toys(bench):
        shape = KINDS[kind]
        real, fake = unit(len(NORMS), shape, 1), unit(len(NORMS), shape, 2) * 2
        for norms in (torch.tensor(NORMS, dtype=torch.float64), torch.zeros(len(NORMS), dtype=torch.float64)):
            direction = unit(len(NORMS), shape)
            critic = Slopes(rows(norms, direction) * direction)
            term, wanted = toy.term(critic, real, fake), toy.said(f, norms).mean()
            what = "a critic with a slope of its own for each sample" if norms.any() else "a critic without slope"
            if not close(term, wanted, 1e-4):
                w = critic.w.detach()
                guess = _likely(term.item(), partial(toy.said, f), w, norms)
                expect(False, f"on {kind}s, {what} gives {term.item():.6g}, the claim {wanted.item():.6g}{guess}")
            (gradient,) = torch.autograd.grad(term, critic.w)
            expect(gradient.isfinite().all(), f"on {kind}s, {what} has a gradient that is not finite",
                   "a root has no slope at 0: gankit.functional.norm_per_sample has 0 there")  # fmt: skip


def _likely(value: float, f: Callable[[Tensor], Tensor], w: Tensor, norms: Tensor) -> str:
    """What the value is that is not the one wanted, if it is one of the usual slips."""
    return _slip(value, {
        "a sum over the batch": f(norms).sum(),
        "one norm for the whole batch": f(norms.norm().view(1)).mean(),
        "a norm over one axis alone": f(w.norm(dim=1)).mean(),
        "a norm over the last axis alone": f(w.norm(dim=-1)).mean(),
        "a mean over features in place of a sum": f(w.flatten(1).square().mean(1).sqrt()).mean(),
        "the function of the mean norm": f(norms.mean().view(1)).mean(),
        "half of it": f(norms).mean() / 2,
        "twice that": f(norms).mean() * 2,
    })  # fmt: skip


def _slip(value: float, slips: Mapping[str, Tensor]) -> str:
    return next((f", which is {slip}" for slip, found in slips.items() if close(value, found, 1e-4)), "")


def claimed_slopes(bench: Bench) -> None:
    """Claimed a function of logits and gradient norms: equal to it on a critic of known logits and slopes on both sides.

    Mend: the formula, or the claim; mind which side is which, and factors.
    """
    f = bench.claims.slopes
    if f is None:
        raise Skipped("its claims do not give slopes")
    for kind, toy in toys(bench):
        real, fake = unit(6, KINDS[kind], 1), unit(6, KINDS[kind], 2) * 2
        points, direction = torch.cat([real, fake]), unit(12, KINDS[kind])
        logits = torch.tensor((0.3, -1.2, 0.9, 2.0, -0.4, 1.1, -0.8, 0.5, 1.7, -2.0, 0.1, 0.6), dtype=torch.float64)
        steep = torch.tensor((0.7, 1.9, 0.4, 1.0, 2.6, 1.3, 0.9, 2.1, 0.5, 1.6, 3.0, 1.2), dtype=torch.float64)
        for norms, step in ((steep, STEP), (steep, EARLY), (0 * steep, STEP)):
            critic = Known(points, logits.clone(), rows(norms, direction) * direction)
            try:
                term = toy.term(critic, real, fake, step=step)
            except Skipped:
                if step == EARLY:  # no step of a lazy penalty
                    continue
                raise
            said = partial(toy.said, f, step=step)
            r, rn, s, sn = logits[:6], norms[:6], logits[6:], norms[6:]
            wanted = said(r, rn, s, sn)
            if not close(term, wanted, 1e-4):
                guess = _slip(term.item(), {
                    "that of the sides swapped": said(s, sn, r, rn), "that of the logits swapped": said(s, rn, r, sn),
                    "that of the slopes swapped": said(r, sn, s, rn), "half of it": wanted / 2, "twice that": wanted * 2,
                    "a sum over the batch": wanted * len(r), "that of the squared norms": said(r, rn**2, s, sn**2),
                })  # fmt: skip
                expect(False, f"on {kind}s, a critic of known logits and slopes gives {term.item():.6g} in step {step}, the "
                       f"claim {wanted.item():.6g}{guess}")  # fmt: skip
            gradients = torch.autograd.grad(term, (critic.w, critic.logits), allow_unused=True)
            expect(all(g is None or g.isfinite().all() for g in gradients),
                   f"on {kind}s, with slopes {'as known' if norms.any() else 'of 0'} it has a gradient that is not finite",
                   "a root has no slope at 0: gankit.functional.norm_per_sample has 0 there")  # fmt: skip


def claimed_place(bench: Bench) -> None:
    """Claimed where the slope is taken: on a critic whose slope is x itself, the term tells at which x.

    Between the sides that is another place with other random numbers; near the real samples it depends on them alone.

    Mend: real, fake, or ``gankit.functional.interpolate`` between them; mind which side is which.
    """
    f, at = bench.claims.gradient_norm, bench.claims.at
    if f is None or at is None:
        raise Skipped("its claims do not give gradient_norm and at")
    for kind, toy in toys(bench):
        direction = unit(8, KINDS[kind])
        r, s = (torch.linspace(a, b, 8, dtype=torch.float64) for a, b in ((0.2, 0.6), (2.0, 3.0)))
        near, far = (rows(norms, direction) * direction for norms in (r, s))
        term = toy.term(Bowl(), near, far).item()
        at_real, at_fake = (toy.said(f, norms).mean().item() for norms in (r, s))
        if at in ("real", "fake"):
            wanted, other = (at_real, at_fake) if at == "real" else (at_fake, at_real)
            hint = " , which is that of the other side".replace(" ,", ",") if close(term, other, 1e-4) else ""
            expect(
                close(term, wanted, 1e-4),
                f"on {kind}s, at {at} samples the term should be {wanted:.6g}, it is {term:.6g}{hint}",
            )
        elif at == "between":
            path = torch.stack([toy.said(f, r + u * (s - r)) for u in torch.linspace(0, 1, 201, dtype=torch.float64)])
            low, high = path.min(0).values.mean().item(), path.max(0).values.mean().item()
            inside = low - 1e-6 * abs(low) <= term <= high + 1e-6 * abs(high)
            ends = close(term, at_real, 1e-4) or close(term, at_fake, 1e-4)
            expect(inside and not ends, f"on {kind}s, between real and fake samples the term lies within {low:.6g} and "
                   f"{high:.6g}, at them it is {at_real:.6g} and {at_fake:.6g}; it is {term:.6g}")  # fmt: skip
            again = [toy.term(Bowl(), near, far, seed).item() for seed in range(1, 5)]
            expect(
                not all(close(value, term) for value in again),
                f"on {kind}s, between real and fake samples it is always at the same place: whatever the random numbers, "
                f"the term is {term:.6g}",
                "one random number for each sample, such as `gankit.functional.interpolate` draws",
            )
            # along two axes, so that w . x = 1 all the way between them
            x, y = torch.zeros(2, 8, *KINDS[kind], dtype=torch.float64)
            x.flatten(1)[:, 0], y.flatten(1)[:, -1] = 0.5, 2.0
            w = 4 * x[:1] + y[:1] / 4
            term, wanted = toy.term(Valley(w), x, y).item(), toy.said(f, w.detach().norm().view(1)).mean().item()
            expect(
                close(term, wanted, 1e-4),
                f"on {kind}s, on the straight way from a real to a fake sample the term should be {wanted:.6g}, it is "
                f"{term:.6g}, which is beside it",
                "the same random number for all elements of a sample, such as `gankit.functional.interpolate` draws",
            )
        else:
            other = toy.term(Bowl(), near, -far).item()
            expect(
                close(term, other),
                f"on {kind}s, near real samples the term does not depend on the fake ones, but it does",
            )
            moved = toy.term(Bowl(), near + MOVED, far).item()
            expect(
                not close(term, moved),
                f"on {kind}s, near real samples the term depends on where they are, but it is {term:.6g} wherever they are",
                "add the noise to the real samples, `view.real`",
            )


def claimed_draws(bench: Bench) -> None:
    """Claimed per sample: each sample has its own random draw, so the mean over a batch scatters less than one sample.

    Mend: ``.mean()`` over the samples, and random numbers for each, such as ``gankit.functional.mixing_weights`` gives.
    """
    if not bench.claims.per_sample:
        raise Skipped("its claims do not say per_sample")
    scenes = [scene for scene in bench.scenes() if scene.kind == "vector" and scene.phase == "g" and _draws(scene)]
    for scene in scenes:
        for name in scene.play():
            (mean, one), (mean_many, many) = (_scatter(scene, name, n) for n in (1, 16))
            near = abs(mean - mean_many) <= 6 * math.sqrt((one + many) / STREAMS) + 1e-9 * abs(mean)
            expect(near, f"the term {name!r} of {scene.where} is {mean_many:.3g} on average for 16 equal samples, and "
                   f"{mean:.3g} for one")  # fmt: skip
            expect(many < one / 4, f"the term {name!r} of {scene.where} scatters for 16 equal samples by {many / one:.2f} "
                   "of that of one, with draws of their own it is 0.06")  # fmt: skip
    for kind, toy in toys(bench) if bench.has("pre_d_loss") else ():
        x = unit(1, KINDS[kind])
        spread = []
        for n in (1, 16):
            real, fake = (c * x.expand(n, *x.shape[1:]) for c in (0.5, 2.0))
            values = [toy.term(Bowl(), real.clone(), fake.clone(), seed).item() for seed in range(STREAMS)]
            spread.append(torch.tensor(values, dtype=torch.float64).var().item())
        one, many = spread
        if one > 1e-20:
            expect(many < one / 4, f"on {kind}s, the term of 16 equal samples scatters by {many / one:.2f} of that of one "
                   "sample, with draws of their own it is 0.06")  # fmt: skip


def _scatter(scene: Scene, name: str, n: int) -> tuple[float, float]:
    """Mean and variance of a term over random streams, for n equal samples."""
    real, z = (t[:1].expand(n, *t.shape[1:]).clone() for t in (scene.real, scene.z))
    values = []
    for scene.seed in range(STREAMS):
        values.append(scene.play(real, z)[name].item())
    scene.seed = 1
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.var().item()


def claimed_mean(bench: Bench) -> None:
    """Claimed per sample: order does not matter, a batch twice over gives the same, and two halves give the mean of theirs.

    Mend: ``.mean()`` over the samples, no sum; nothing computed across the batch, no pairing by place.
    """
    if not bench.claims.per_sample:
        raise Skipped("its claims do not say per_sample")
    # the shipped generator of images has batch norm, through which generated samples depend on each other
    scenes = [scene for scene in bench.scenes() if scene.kind == "vector" and not _draws(scene)]
    if not scenes:
        raise Skipped("its terms draw random numbers: see claimed_draws")
    for scene in scenes:
        real, z = scene.real, scene.z
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        plain = _values(scene, real, z)
        cases = {
            "the samples in another order": _values(scene, real[order], z[order]),
            "the batch twice over": _values(scene, torch.cat([real, real]), torch.cat([z, z])),
        }
        halves = [_values(scene, real[i::2], z[i::2]) for i in (0, 1)]
        cases["the mean of two half batches"] = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
        for what, found in cases.items():
            for name, value in found.items():
                expect(close(value, plain[name], 1e-6), f"{what} gives the term {name!r} of {scene.where} {value:.6g}, not "
                       f"{plain[name]:.6g}")  # fmt: skip


def _values(scene: Scene, real: Tensor, z: Tensor) -> dict[str, float]:
    return {name: term.item() for name, term in scene.play(real, z).items()}


def _draws(scene: Scene) -> bool:
    """Whether its terms draw random numbers of its own."""
    scene.play()
    fresh = torch.Generator().manual_seed(1).get_state()
    return not torch.equal(scene.gan.rng(scene.plugin).get_state(), fresh)


def claimed_sign(bench: Bench) -> None:
    """Claimed never below 0.

    Mend: the sign of the term, or the claim.
    """
    if not bench.claims.non_negative:
        raise Skipped("its claims do not say non_negative")
    for record in bench.trained():
        own = record.terms["d"] | record.terms["g"]
        for phase, step, terms in record.updates:
            for name in own & terms.keys():
                expect(
                    not terms[name] < 0,
                    f"the {phase.upper()} term {name!r} is {terms[name]:.6g} in step {step} on {record.kind}s",
                )


def claimed_deterministic(bench: Bench) -> None:
    """Claimed to draw no random numbers.

    Mend: the claim, if it is meant to be random.
    """
    if not bench.claims.deterministic:
        raise Skipped("its claims do not say deterministic")
    for record in bench.trained():
        assert record.gan is not None
        expect(f"plugin:{bench.name}" not in record.gan.rngs, f"on {record.kind}s, it asks for gan.rng(self)")


def claimed_stateless(bench: Bench) -> None:
    """Claimed to remember nothing.

    Mend: the claim, and a ``state_dict``, if it is meant to remember.
    """
    if not bench.claims.stateless:
        raise Skipped("its claims do not say stateless")
    expect(not hasattr(bench.factory, "state_dict"), "it has a state_dict")
    for kind in bench.kinds():
        with quiet(), global_random(0):
            plugin = bench.plugin()
            gan = bench.gan(kind, {bench.name: plugin})
            before = _facts(plugin)
            train(gan, WARM)
            after = _facts(plugin)
        changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
        expect(not changed, f"on {kind}s, training changes its attribute {min(changed, default='')}")


def _facts(plugin: object) -> dict[str, str]:
    return {path: repr(value) for path, value in walk(vars(plugin), "") if path}


def claimed_logits(bench: Bench) -> None:
    """Claimed a function of the logits: equal to it, for logits of any shape.

    Mend: the formula, or the claim.
    """
    f = bench.claims.logits
    if f is None:
        raise Skipped("its claims do not give logits")
    for kind, toy in toys(bench):
        x = unit(6, KINDS[kind])
        for shape in ((6,), (6, 1), (6, 1, 2, 2)):
            stream = torch.Generator().manual_seed(0)
            r, s = (torch.randn(shape, generator=stream, dtype=torch.float64).requires_grad_() for _ in range(2))
            term = toy.term(Bowl(), x, x, real_logits=r, fake_logits=s)
            wanted = toy.said(f, r, s)
            expect(
                close(term, wanted, 1e-6),
                f"on {kind}s, logits of shape {shape} give {term.item():.6g}, the claim {wanted.item():.6g}",
            )


def claimed_costs(bench: Bench) -> None:
    """Claimed costs: the forward passes of the critic and the double backward passes that it adds to an update of D.

    Mend: use the logits and the view at hand instead of scoring again, or correct the claim.
    """
    claims = bench.claims
    wanted = {"forward": claims.forwards, "double_backward": claims.double_backwards}
    if set(wanted.values()) == {None}:
        raise Skipped("its claims do not give forwards or double_backwards")
    for record in bench.trained():
        for subject, number in wanted.items():
            hook = TERM_HOOKS["d"]
            found = max(
                (n for (what, where, _), n in record.costs.items() if (what, where) == (subject, hook)), default=0
            )
            expect(
                number is None or found == number,
                f"on {record.kind}s, an update of D costs {found} {subject.replace('_', ' ')} passes, not {number}",
            )
