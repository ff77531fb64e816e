"""Views that treat the sides unlike, cut the graph, or lose samples."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

import torch
from torch import Tensor

from broken import Plugin
from gankit import GAN, View, hookimpl
from gankit.claims import Claims


class View_(Plugin):
    """Noise on both sides; right."""

    def noisy(self, gan: GAN, x: Tensor) -> Tensor:
        return x + 0.1 * torch.empty_like(x).normal_(generator=gan.rng(self))


class OnlyReal(View_):
    """The critic learns to tell noise."""

    caught_by: ClassVar[str] = "view_sides_alike"

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        return View((self.noisy(gan, view.real[0]), *view.real[1:]), view.fake)


class LeaksTheSide(View_):
    """As much noise on both sides: it raises the real one and lowers the other."""

    caught_by: ClassVar[str] = "view_sides_alike"

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        (real, *others), (fake, *fake_others) = view
        noise = [0.1 * torch.empty_like(x).normal_(generator=gan.rng(self)).abs() for x in (real, fake)]
        return View((real + noise[0], *others), (fake - noise[1], *fake_others))


class NoisierFakes(View_):
    """Half as much noise again on the generated side."""

    caught_by: ClassVar[str] = "view_sides_alike"

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        (real, *others), (fake, *fake_others) = view
        return View((self.noisy(gan, real), *others), (self.noisy(gan, fake / 1.5) * 1.5, *fake_others))


class SmootherFakes(View_):
    """As much noise on both sides, but on the generated one the same number for all of a sample."""

    caught_by: ClassVar[str] = "view_sides_alike"

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        (real, *others), (fake, *fake_others) = view
        one = fake.flatten(1)[:, 0].view(-1, *(1,) * (fake.dim() - 1))
        return View((self.noisy(gan, real), *others), (fake + self.noisy(gan, one) - one, *fake_others))


class CutsG(View_):
    """G is trained by nothing."""

    caught_by: ClassVar[str] = "view_gradient"

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        real, fake = (self.noisy(gan, side[0].detach()) for side in view)
        return View((real, *view.real[1:]), (fake, *view.fake[1:]))


class DropsOne(View_):
    """The last sample of each side is left out."""

    caught_by: ClassVar[str] = "view_form"

    @hookimpl(wrapper=True)
    def view(self) -> Generator[None, View, View]:
        view = yield
        real, fake = (tuple(t[:-1] for t in side) for side in view)
        return View(real, fake)


class SinglePrecision(View_):
    """Right as long as all is float32."""

    caught_by: ClassVar[str] = "view_form"

    @hookimpl(wrapper=True)
    def view(self) -> Generator[None, View, View]:
        view = yield
        real, fake = ((2 * side[0].float(), *side[1:]) for side in view)
        return View(real, fake)


class WholeBatchesOnly(View_):
    """Right as long as all batches are of one size."""

    caught_by: ClassVar[str] = "view_form"

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        x = view.real[0]
        factor = torch.linspace(1, 1, gan.batch_size, device=x.device, dtype=x.dtype).view(-1, *(1,) * (x.dim() - 1))
        real, fake = ((factor * side[0], *side[1:]) for side in view)
        return View(real, fake)


class Counts(View_):
    """A schedule that falls with every call, and others call, too."""

    caught_by: ClassVar[str] = "view_again"

    calls = 0

    @hookimpl(wrapper=True)
    def view(self) -> Generator[None, View, View]:
        view = yield
        self.calls += 1
        real, fake = (((1 + 1 / self.calls) * side[0], *side[1:]) for side in view)
        return View(real, fake)

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class OnlyInD(View_):
    """G is judged on what D was not trained on."""

    caught_by: ClassVar[str] = "view_phases_alike"

    @hookimpl(wrapper=True)
    def view(self, gan: GAN, phase: str) -> Generator[None, View, View]:
        view = yield
        if phase == "g":
            return view
        real, fake = ((self.noisy(gan, side[0]), *side[1:]) for side in view)
        return View(real, fake)


class Forgets(View_):
    """Codes and labels of others are dropped without a word."""

    caught_by: ClassVar[str] = "view_keeps_others"

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        return View((self.noisy(gan, view.real[0]),), (self.noisy(gan, view.fake[0]),))


class NoisyLabels(View_):
    """All of the view becomes noisy, labels too."""

    caught_by: ClassVar[str] = "view_keeps_others"

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        real, fake = (tuple(self.noisy(gan, t.to(side[0].dtype)) for t in side) for side in view)
        return View(real, fake)


class OneDraw(View_):
    """One factor for the whole batch, where one for each sample is claimed."""

    caught_by: ClassVar[str] = "claimed_rows_apart"
    claims: ClassVar[Claims] = Claims(per_sample=True)

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        rng = gan.rng(self)
        real, fake = (
            side[0] * (1 + 0.1 * torch.rand((), generator=rng, device=side[0].device, dtype=side[0].dtype))
            for side in view
        )
        return View((real, *view.real[1:]), (fake, *view.fake[1:]))
