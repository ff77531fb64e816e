"""Terms that train nothing, something else, or as much as nobody asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from broken import Plugin
from gankit import GAN, Batch, View, hookimpl
from gankit.functional import extra_pass, input_gradients, squared_gradient_norm


class TrainsNothing(Plugin):
    """It requires a gradient, through the view that everybody may differentiate, and reaches no parameter."""

    caught_by: ClassVar[str] = "gradient_reaches"

    @hookimpl
    def pre_d_loss(self, view: View) -> dict[str, Tensor]:
        return self.term(view.real[0].square().mean())


class OnlyLooksTrained(Plugin):
    """``0 * logits`` to please the contract."""

    caught_by: ClassVar[str] = "gradient_reaches"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        (slope,) = torch.autograd.grad(real_logits.sum(), view.real[:1], retain_graph=True)
        return self.term(slope.square().mean() + 0 * real_logits.sum())


class TrainsD(Plugin):
    """A G term of samples that are cut off from G."""

    caught_by: ClassVar[str] = "gradient_reaches"

    @hookimpl
    def post_g_loss(self, view: View, gan: GAN) -> dict[str, Tensor]:
        shown = tuple(t.detach() for t in view.fake)
        return self.term(gan.discriminator(*shown).square().mean())


class ReachesG(Plugin):
    """New samples in D's loss, with G's graph."""

    caught_by: ClassVar[str] = "leaves_g_alone"

    @hookimpl
    def pre_d_loss(self, gan: GAN, batch: Batch, real_logits: Tensor) -> dict[str, Tensor]:
        fake = extra_pass(gan.generator, batch.z)
        distance = (batch.real - fake).flatten(1).norm(dim=1).mean()
        return self.term(real_logits.square().mean() * distance)


class HalfCut(Plugin):
    """A norm that counts as a number: half of the gradient is missing."""

    caught_by: ClassVar[str] = "derivative"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        (slope, *_) = input_gradients(real_logits, view.real)
        squares = slope.flatten(1).square().sum(1)
        return self.term((squares / squares.mean().detach().sqrt()).mean())


class FirstOrder(Plugin):
    """``create_graph`` forgotten; the logits beside it keep the term connected."""

    caught_by: ClassVar[str] = "derivative"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        (slope,) = torch.autograd.grad(real_logits.sum(), view.real[:1], retain_graph=True)
        return self.term(slope.flatten(1).square().sum(1).mean() + real_logits.square().mean())


class NeverOff(Plugin):
    """``or``: a weight of 0 is taken for none."""

    caught_by: ClassVar[str] = "weight_zero"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        ((name, _),) = self.term(real_logits).items()
        return {name: (self.weight or 1.0) * real_logits.square().mean()}


class NeverActs(Plugin):
    """It waits for a step that never comes."""

    caught_by: ClassVar[str] = "terms_seen"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor, step: int) -> dict[str, Tensor] | None:
        return self.term(real_logits.square().mean()) if step == 0 else None


class HalfCutLater(HalfCut):
    """The same from step 1000 on, when nobody looks any more."""

    caught_by: ClassVar[str] = "derivative"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor, step: int) -> dict[str, Tensor] | None:
        return super().pre_d_loss(view, real_logits) if step > 1000 else None


class WeightCubed(Plugin):
    """The weight in ``grad_outputs`` and outside."""

    caught_by: ClassVar[str] = "weight_is_a_factor"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        outputs = self.weight * torch.ones_like(real_logits) / real_logits[0].numel()
        (slope,) = torch.autograd.grad(real_logits, view.real[:1], outputs, create_graph=True)
        return self.term(slope.flatten(1).square().sum(1).mean())


@dataclass(eq=False)
class Lazy(Plugin):
    """Every k-th step, as weak as always."""

    caught_by: ClassVar[str] = "every"
    every: Annotated[int, "apply in every k-th step"] = 1

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor, step: int) -> dict[str, Tensor] | None:
        if step % self.every:
            return None
        return self.term(squared_gradient_norm(real_logits, view.real).mean())


@dataclass(eq=False)
class NeverLazy(Plugin):
    """In every step, k times as strong."""

    caught_by: ClassVar[str] = "every"
    every: Annotated[int, "apply in every k-th step, k times as strong"] = 1

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor] | None:
        return self.term(self.every * squared_gradient_norm(real_logits, view.real).mean())
