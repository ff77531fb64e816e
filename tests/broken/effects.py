"""Hooks that touch what is not theirs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from broken import Plugin
from gankit import GAN, Batch, View, hookimpl
from gankit.claims import Claims
from gankit.functional import interpolate, logit_per_sample, squared_gradient_norm


class NoiseInPlace(Plugin):
    """Noise is added to the core's own real samples."""

    caught_by: ClassVar[str] = "inputs_kept"

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        noise = torch.empty_like(view.real[0]).normal_(0, 0.1, generator=gan.rng(self))
        view.real[0].add_(noise)
        return View(view.real, (view.fake[0] + noise, *view.fake[1:]))


class ClampsTheView(Plugin):
    """In place, though it changes no value: what was saved for a backward pass is now invalid."""

    caught_by: ClassVar[str] = "inputs_kept"

    @hookimpl(wrapper=True)
    def view(self) -> Generator[None, View, View]:
        view = yield
        view.real[0].clamp_(-5, 5)
        return view


class ClipsTooEarly(Plugin):
    """Weights are clipped before scoring, not after the update."""

    caught_by: ClassVar[str] = "weights_kept"

    @hookimpl(wrapper=True)
    def critic(self, gan: GAN) -> Generator[None, Callable[..., Tensor], Callable[..., Tensor]]:
        critic = yield
        with torch.no_grad():
            for p in gan.parameters("d"):
                p.clamp_(-0.5, 0.5)
        return critic


class ClipsG(Plugin):
    """The critic's weights are to be clipped, and G's are."""

    caught_by: ClassVar[str] = "g_weights_kept"

    @hookimpl
    @torch.no_grad()
    def post_step(self, gan: GAN, phase: str) -> None:
        if phase == "d":
            for p in gan.generator.parameters():
                p.clamp_(-0.01, 0.01)


@dataclass(eq=False)
class LazyNoise(Plugin):
    """Its noise is from torch's global generator, but only in every fourth step, which few look at."""

    caught_by: ClassVar[str] = "global_random"
    every: Annotated[int, "apply in every k-th step, k times as strong"] = 4

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor, step: int) -> dict[str, Tensor] | None:
        if step % self.every:
            return None
        return self.term(self.every * (real_logits + torch.randn_like(real_logits)).square().mean())


class SecondForward(Plugin):
    """G runs once more and counts the batch in its batch norms."""

    caught_by: ClassVar[str] = "weights_kept"
    data: ClassVar[tuple[str, ...]] = ("vector", "image")

    @hookimpl
    def post_g_loss(self, gan: GAN, batch: Batch) -> dict[str, Tensor]:
        other = gan.generator(gan.latent.draw(len(batch.z), gan.rng(self)))
        return self.term(-(other - batch.fake).abs().mean())


class CallsBackward(Plugin):
    """It adds its gradient itself."""

    caught_by: ClassVar[str] = "grads_kept"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> None:
        (self.weight * real_logits.square().mean()).backward(retain_graph=True)


class NoGradAroundYield(Plugin):
    """What other plugins and the core do inside runs without gradients."""

    caught_by: ClassVar[str] = "switches_kept"

    @hookimpl(wrapper=True)
    def view(self) -> Generator[None, View, View]:
        with torch.no_grad():
            view = yield
        return view


class LeavesEval(Plugin):
    """D is put in evaluation mode, and stays there."""

    caught_by: ClassVar[str] = "switches_kept"

    @hookimpl
    def pre_d_loss(self, gan: GAN, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        gan.discriminator.eval()
        return self.term((gan.discriminator(*view.real) + real_logits).square().mean())


class SetsOneThread(Plugin):
    """Small networks are fastest on one thread, so it takes one for everybody."""

    caught_by: ClassVar[str] = "switches_kept"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        torch.set_num_threads(1)
        return self.term(real_logits.square().mean())


class GlobalNoise(Plugin):
    """``torch.rand`` without a generator."""

    caught_by: ClassVar[str] = "global_random"
    claims: ClassVar[Claims] = Claims(per_sample=True)

    @hookimpl
    def pre_d_loss(self, critic: Callable[..., Tensor], view: View) -> dict[str, Tensor]:
        x = interpolate(view.real, view.fake, detach=False)
        return self.term(squared_gradient_norm(critic(*x), x).mean())


class NoiseLike(Plugin):
    """``randn_like`` the logits, of whatever shape; a function of the logits in the mean, and so it claims."""

    caught_by: ClassVar[str] = "global_random"
    claims: ClassVar[Claims] = Claims(logits=lambda self, real, fake: self.weight * real.mean(), per_sample=True)

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term((real_logits + 0.1 * torch.randn_like(real_logits)).mean())


class GlobalNoiseInView(Plugin):
    """``randn_like`` what the critic is shown."""

    caught_by: ClassVar[str] = "global_random"
    claims: ClassVar[Claims] = Claims(per_sample=True)

    @hookimpl(wrapper=True)
    def view(self) -> Generator[None, View, View]:
        view = yield
        real, fake = (side[0] + 0.1 * torch.randn_like(side[0]) for side in view)
        return View((real, *view.real[1:]), (fake, *view.fake[1:]))


class GlobalInit(Plugin):
    """New layers in ``setup``, initialised from the global generator as it happens to be."""

    caught_by: ClassVar[str] = "global_random"

    @hookimpl
    def setup(self, gan: GAN) -> None:
        for m in gan.discriminator.modules():
            if isinstance(m, nn.Linear):
                nn.init.orthogonal_(m.weight)


class TakesLatents(Plugin):
    """The run's own latents are drawn: with the plugin, everybody else sees other ones."""

    caught_by: ClassVar[str] = "own_stream"

    @hookimpl
    def post_g_loss(self, gan: GAN, batch: Batch) -> dict[str, Tensor]:
        z = gan.next_z(len(batch.z))
        return self.term((batch.z - z).abs().mean() * batch.fake.square().mean())


class SeedsItself(Plugin):
    """A generator of its own, seeded by the step: the run's seed does not matter."""

    caught_by: ClassVar[str] = "own_generator"
    claims: ClassVar[Claims] = Claims(per_sample=True)

    @hookimpl
    def pre_d_loss(self, critic: Callable[..., Tensor], view: View, step: int) -> dict[str, Tensor]:
        x = interpolate(view.real, view.fake, torch.Generator().manual_seed(step), detach=False)
        return self.term(squared_gradient_norm(critic(*x), x).mean())


class OnTheCPU(Plugin):
    """Mixing weights without a device."""

    caught_by: ClassVar[str] = "any_device"

    @hookimpl
    def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], view: View) -> dict[str, Tensor]:
        real, fake = view.real[0], view.fake[0]
        u = torch.rand(len(real), generator=gan.rng(self), dtype=real.dtype).view(-1, *(1,) * (real.dim() - 1))
        x = u * real + (1 - u) * fake
        return self.term(squared_gradient_norm(critic(x, *view.real[1:]), (x,)).mean())


class OnTheCPUInSteps(Plugin):
    """Weights by their place, without a device, in the right dtype."""

    caught_by: ClassVar[str] = "any_device"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        weights = torch.linspace(0, 1, len(real_logits)).to(real_logits.dtype)
        return self.term((weights * logit_per_sample(real_logits)).square().mean())


class OnTheCPUByName(Plugin):
    """The device of all tensors, written into the code."""

    caught_by: ClassVar[str] = "any_device"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        ones = torch.ones(len(real_logits), dtype=real_logits.dtype, device=torch.device("cpu"))
        return self.term((ones + logit_per_sample(real_logits)).square().mean())


CPU = torch.device("cpu")


class OnTheCPUByAnotherName(Plugin):
    """The same, under a name."""

    caught_by: ClassVar[str] = "any_device"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        ones = torch.ones(
            len(real_logits),
            dtype=real_logits.dtype,
            device=CPU,
        )
        return self.term((ones + logit_per_sample(real_logits)).square().mean())


class FromAList(Plugin):
    """Numbers from a list; ``as_tensor`` does not know for what."""

    caught_by: ClassVar[str] = "any_device"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        weights = torch.as_tensor([0.5] * len(real_logits), dtype=real_logits.dtype)
        return self.term((weights * logit_per_sample(real_logits)).square().mean())


class FillsACopy(Plugin):
    """A buffer without a device: what is copied into it comes to lie on the CPU."""

    caught_by: ClassVar[str] = "any_device"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        known = torch.empty(real_logits.shape, dtype=real_logits.dtype).copy_(real_logits.detach())
        return self.term((known * real_logits).mean())


@dataclass(eq=False)
class MadeBefore(Plugin):
    """A target that is made with the plugin, long before there is a device."""

    caught_by: ClassVar[str] = "any_device"

    def __post_init__(self) -> None:
        self.target = torch.zeros(1)

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term((logit_per_sample(real_logits) - self.target).square().mean())


class AverageOnTheCPU(Plugin):
    """An average that begins in ``setup``, without a device, and is mixed with logits after the step."""

    caught_by: ClassVar[str] = "any_device"

    @hookimpl
    def setup(self) -> None:
        self.average = torch.zeros(1)

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        self.seen = logit_per_sample(real_logits).detach().mean(0, keepdim=True)
        return self.term((real_logits - self.average.mean()).square().mean())

    @hookimpl
    def post_step(self, phase: str) -> None:
        if phase == "d":
            self.average = self.average.lerp(self.seen.to(self.average.dtype), 0.1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average = state["average"]


class AsksForValues(Plugin):
    """``if`` on a tensor, in every step."""

    caught_by: ClassVar[str] = "no_waiting"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor] | None:
        drift = real_logits.square().mean()
        return self.term(drift) if drift > 0 else None


class ReadsAfterwards(Plugin):
    """Its term as a number, after every step."""

    caught_by: ClassVar[str] = "no_waiting"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())

    @hookimpl
    def post_step(self, terms: dict[str, Tensor], phase: str) -> None:
        if phase == "d":
            self.last = terms["reads_afterwards"].item()


class TakesByMask(Plugin):
    """How many logits are above 0 has to be known before they can be taken."""

    caught_by: ClassVar[str] = "no_waiting"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        x = logit_per_sample(real_logits)
        return self.term(x[x > 0].square().sum() / len(x))


class AsksWhetherEqual(Plugin):
    """No value is read, but one answer."""

    caught_by: ClassVar[str] = "no_waiting"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor] | None:
        return None if torch.equal(view.real[0], view.fake[0]) else self.term(real_logits.square().mean())


class ForgetsHooks(Plugin):
    """A hook on a module in every update, never removed."""

    caught_by: ClassVar[str] = "no_growth"

    @hookimpl
    def pre_d_loss(self, gan: GAN, real_logits: Tensor) -> dict[str, Tensor]:
        gan.discriminator.register_forward_hook(lambda *_: None)
        return self.term(real_logits.square().mean())


class Prints(Plugin):
    """It tells the terminal."""

    caught_by: ClassVar[str] = "no_printing"

    @hookimpl
    def post_step(self, step: int) -> None:
        print(f"step {step}")
