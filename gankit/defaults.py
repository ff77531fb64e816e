"""The core's own answers to the hooks that need one; plugins wrap or replace them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from gankit.contract import Batch, View
from gankit.hookspecs import hookimpl

if TYPE_CHECKING:
    from gankit.gan import GAN


class CoreHooks:
    """Draw G(z), show the raw samples, let the discriminator score them."""

    @hookimpl(trylast=True)
    def sample(self, gan: GAN, real: Tensor, z: Tensor) -> Batch:
        """The real samples beside G(z)."""
        return Batch(real, gan.generator(z), z)

    @hookimpl(trylast=True)
    def view(self, batch: Batch) -> View:
        """One tensor a side: the samples themselves."""
        return View((batch.real,), (batch.fake,))

    @hookimpl(trylast=True)
    def critic(self, gan: GAN) -> Callable[..., Tensor]:
        """The discriminator as it is."""
        critic: Callable[..., Tensor] = gan.discriminator
        return critic
