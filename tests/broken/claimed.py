"""Claims that do not hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from broken import Plugin
from gankit import GAN, Batch, View, hookimpl
from gankit.checks import need_per_sample_critic
from gankit.claims import Claims
from gankit.functional import (
    extra_pass,
    input_gradients,
    interpolate,
    logit_per_sample,
    norm_per_sample,
    squared_gradient_norm,
)

NORM = Claims(gradient_norm=lambda self, norm: self.weight * (norm - 1) ** 2)


class Slope(Plugin):
    """mean (||grad D|| - 1)^2 at the real samples; right, and the base of what is wrong."""

    def size(self, slopes: Sequence[Tensor]) -> Tensor:
        return norm_per_sample(slopes)

    def reduced(self, excess: Tensor) -> Tensor:
        return excess.square().mean()

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(self.reduced(self.size(input_gradients(real_logits, view.real)) - 1))


class OneNorm(Slope):
    """One norm for the whole batch."""

    caught_by: ClassVar[str] = "claimed_norm"
    claims: ClassVar[Claims] = NORM

    def size(self, slopes: Sequence[Tensor]) -> Tensor:
        return torch.cat([s.flatten() for s in slopes]).norm()


class WrongAxis(Slope):
    """A norm over the last dimension, right for vectors."""

    caught_by: ClassVar[str] = "claimed_norm"
    data: ClassVar[tuple[str, ...]] = ("vector", "image")
    claims: ClassVar[Claims] = NORM

    def size(self, slopes: Sequence[Tensor]) -> Tensor:
        return slopes[0].norm(dim=-1)


class Sums(Slope):
    """A sum over the batch: twice the batch, twice the weight."""

    caught_by: ClassVar[str] = "claimed_norm"
    claims: ClassVar[Claims] = NORM

    def reduced(self, excess: Tensor) -> Tensor:
        return excess.square().sum()


class MeanOverFeatures(Slope):
    """A root mean square in place of a norm: weaker for larger images."""

    caught_by: ClassVar[str] = "claimed_norm"
    claims: ClassVar[Claims] = NORM

    def size(self, slopes: Sequence[Tensor]) -> Tensor:
        return slopes[0].flatten(1).square().mean(1).sqrt()


class NormOfMean(Slope):
    """The function of the mean norm."""

    caught_by: ClassVar[str] = "claimed_norm"
    claims: ClassVar[Claims] = NORM

    def reduced(self, excess: Tensor) -> Tensor:
        return excess.mean().square()


class RootOfNothing(Slope):
    """A root whose slope at 0 is infinite: a flat critic makes every weight not a number."""

    caught_by: ClassVar[str] = "claimed_norm"
    claims: ClassVar[Claims] = NORM

    def size(self, slopes: Sequence[Tensor]) -> Tensor:
        return slopes[0].flatten(1).square().sum(1).sqrt()


class HalfTheWeight(Slope):
    """A factor 1/2 that the formula does not have."""

    caught_by: ClassVar[str] = "claimed_norm"
    claims: ClassVar[Claims] = NORM

    def reduced(self, excess: Tensor) -> Tensor:
        return excess.square().mean() / 2


class WrongSide(Slope):
    """At the real samples, where the generated ones are claimed."""

    caught_by: ClassVar[str] = "claimed_place"
    claims: ClassVar[Claims] = Claims(gradient_norm=NORM.gradient_norm, at="fake")


class NotBetween(Slope):
    """At the real samples, where the way between is claimed."""

    caught_by: ClassVar[str] = "claimed_place"
    claims: ClassVar[Claims] = Claims(gradient_norm=NORM.gradient_norm, at="between")


class HalfWay(Plugin):
    """Always half way, where anywhere between is claimed."""

    caught_by: ClassVar[str] = "claimed_place"
    claims: ClassVar[Claims] = Claims(gradient_norm=NORM.gradient_norm, at="between")

    @hookimpl
    def pre_d_loss(self, critic: Callable[..., Tensor], view: View) -> dict[str, Tensor]:
        x = tuple((r + f) / 2 if r.is_floating_point() else r for r, f in zip(*view, strict=True))
        return self.term((norm_per_sample(input_gradients(critic(*x), x)) - 1).square().mean())


class BesideTheWay(Plugin):
    """A mixing weight for each element: anywhere in the box around the two samples."""

    caught_by: ClassVar[str] = "claimed_place"
    claims: ClassVar[Claims] = Claims(gradient_norm=NORM.gradient_norm, at="between")

    @hookimpl
    def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], view: View) -> dict[str, Tensor]:
        def mixed(real: Tensor, fake: Tensor) -> Tensor:
            if not real.is_floating_point():
                return real
            return fake + torch.empty_like(real).uniform_(generator=gan.rng(self)) * (real - fake)

        x = tuple(mixed(r, f) for r, f in zip(*view, strict=True))
        return self.term((norm_per_sample(input_gradients(critic(*x), x)) - 1).square().mean())


class NoiseAlone(Plugin):
    """The noise around the real samples, without the samples."""

    caught_by: ClassVar[str] = "claimed_place"
    claims: ClassVar[Claims] = Claims(gradient_norm=NORM.gradient_norm, at="near_real")

    @hookimpl
    def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], view: View) -> dict[str, Tensor]:
        real, *others = view.real
        noise = real.detach().std(correction=0) * torch.empty_like(real).normal_(generator=gan.rng(self))
        x = (noise.requires_grad_(), *others)
        return self.term((norm_per_sample(input_gradients(critic(*x), x[:1])) - 1).square().mean())


class OneMix(Plugin):
    """One mixing weight for the whole batch."""

    caught_by: ClassVar[str] = "claimed_draws"
    claims: ClassVar[Claims] = Claims(gradient_norm=NORM.gradient_norm, at="between", per_sample=True)

    @hookimpl
    def setup(self, gan: GAN) -> None:
        need_per_sample_critic(gan, "one_mix")

    @hookimpl
    def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], view: View) -> dict[str, Tensor]:
        u = torch.rand((), generator=gan.rng(self), device=view.real[0].device, dtype=view.real[0].dtype)
        x = tuple(u * r + (1 - u) * f if r.is_floating_point() else r for r, f in zip(*view, strict=True))
        return self.term((norm_per_sample(input_gradients(critic(*x), x)) - 1).square().mean())


class AcrossTheBatch(Plugin):
    """A variance over the batch, claimed to be a mean over samples."""

    caught_by: ClassVar[str] = "claimed_mean"
    claims: ClassVar[Claims] = Claims(per_sample=True)

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term((real_logits - real_logits.mean()).square().mean())


class ByPlace(Plugin):
    """Neighbours in the batch are compared."""

    caught_by: ClassVar[str] = "claimed_mean"
    claims: ClassVar[Claims] = Claims(per_sample=True)

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term((real_logits - real_logits.roll(1, 0)).square().mean())


class Negative(Plugin):
    """A sign is wrong."""

    caught_by: ClassVar[str] = "claimed_sign"
    claims: ClassVar[Claims] = Claims(non_negative=True)

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(-real_logits.square().mean())


class Draws(Plugin):
    """Random, claimed deterministic."""

    caught_by: ClassVar[str] = "claimed_deterministic"
    claims: ClassVar[Claims] = Claims(deterministic=True)

    @hookimpl
    def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], view: View) -> dict[str, Tensor]:
        x = interpolate(view.real, view.fake, gan.rng(self), detach=False)
        return self.term(input_gradients(critic(*x), x)[0].square().mean())


@dataclass(eq=False)
class Counts(Plugin):
    """It remembers how often it was there, claimed to remember nothing."""

    caught_by: ClassVar[str] = "claimed_stateless"
    claims: ClassVar[Claims] = Claims(stateless=True)

    def __post_init__(self) -> None:
        self.steps = 0

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())

    @hookimpl
    def post_step(self, **_: Any) -> None:
        self.steps += 1


class OtherLogits(Plugin):
    """A formula of both sides, where one is claimed."""

    caught_by: ClassVar[str] = "claimed_logits"
    claims: ClassVar[Claims] = Claims(logits=lambda self, real, fake: self.weight * real.square().mean())

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor, fake_logits: Tensor) -> dict[str, Tensor]:
        return self.term((real_logits - fake_logits).square().mean())


def js(self: Any, r: Tensor, r_norm: Tensor, f: Tensor, f_norm: Tensor, step: int) -> Tensor:
    """The regularizer of arXiv:1705.09367, as a claim; its weight is twice as much in the first hundred steps."""
    both = ((-r).sigmoid() * r_norm).square().mean() + (f.sigmoid() * f_norm).square().mean()
    return (2 if step < 100 else 1) * self.weight / 2 * both


@dataclass(eq=False)
class WhereItErrs(Plugin):
    """The slope on both sides, weighted by D's error there; right, and the base of what is wrong."""

    claims: ClassVar[Claims] = Claims(slopes=js)

    def error(self, logits: Tensor) -> Tensor:
        return logit_per_sample(logits).sigmoid().square()

    def factor(self, step: int) -> float:
        return 1 if step < 100 else 1 / 2

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor, fake_logits: Tensor, step: int) -> dict[str, Tensor]:
        at_real = self.error(-real_logits) * squared_gradient_norm(real_logits, view.real)
        at_fake = self.error(fake_logits) * squared_gradient_norm(fake_logits, view.fake)
        return self.term(self.factor(step) * (at_real.mean() + at_fake.mean()))


class SidesSwapped(WhereItErrs):
    """It flattens D where D is right."""

    caught_by: ClassVar[str] = "claimed_slopes"

    def error(self, logits: Tensor) -> Tensor:
        return super().error(-logits)


class NoHalf(WhereItErrs):
    """A factor 1/2 that is in the formula alone."""

    caught_by: ClassVar[str] = "claimed_slopes"

    def factor(self, step: int) -> float:
        return 2 * super().factor(step)


class NeverFades(WhereItErrs):
    """The weight of the first steps for ever."""

    caught_by: ClassVar[str] = "claimed_slopes"

    def factor(self, step: int) -> float:
        return 1


class MixesSlopes(Slope):
    """Slopes of single samples, also where batch norm makes a logit depend on all of them."""

    caught_by: ClassVar[str] = "refuses_batch_norm"
    claims: ClassVar[Claims] = Claims(gradient_norm=NORM.gradient_norm, per_sample=True)


class ScoresAgain(Plugin):
    """A forward pass for logits that are at hand."""

    caught_by: ClassVar[str] = "claimed_costs"
    claims: ClassVar[Claims] = Claims(forwards=0, double_backwards=1)

    @hookimpl
    def pre_d_loss(self, critic: Callable[..., Tensor], view: View) -> dict[str, Tensor]:
        slopes = input_gradients(critic(*view.real), view.real)
        return self.term(norm_per_sample(slopes).square().mean())


class Jitter(Plugin):
    """How far a random step in the latent moves the sample; right, and the base of what is wrong."""

    claims: ClassVar[Claims] = Claims(per_sample=True)

    def step(self, gan: GAN, z: Tensor) -> Tensor:
        return torch.empty_like(z).normal_(generator=gan.rng(self))

    def reduce(self, moved: Tensor) -> Tensor:
        return moved.mean()

    @hookimpl
    def post_g_loss(self, gan: GAN, batch: Batch) -> dict[str, Tensor]:
        near = extra_pass(gan.generator, batch.z + 0.1 * self.step(gan, batch.z))
        return self.term(self.reduce((near - batch.fake).flatten(1).square().sum(1)))


class SumOfDraws(Jitter):
    """A sum over the batch, where a mean is claimed; it cannot be compared number by number, as it is random."""

    caught_by: ClassVar[str] = "claimed_draws"

    def reduce(self, moved: Tensor) -> Tensor:
        return moved.sum()


class OneStepForAll(Jitter):
    """One random step for the whole batch."""

    caught_by: ClassVar[str] = "claimed_draws"

    def step(self, gan: GAN, z: Tensor) -> Tensor:
        return torch.empty_like(z[:1]).normal_(generator=gan.rng(self)).expand_as(z)
