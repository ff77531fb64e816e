"""The joint setting of BiGAN and ALI: an encoder E trained with G, and a critic of pairs (x, z).

The discriminator tells (x, E(x)) from (G(z), z); G and E together minimise the mirrored loss on both sides
(Donahue et al. 2017, arXiv:1605.09782, eq. 3; Dumoulin et al. 2017, arXiv:1606.00704). Plugins that need the setting
inherit :class:`Joint`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from torch import nn

from gankit import networks
from gankit.contract import Batch, Player, View
from gankit.errors import UsageError
from gankit.hookspecs import hookimpl

if TYPE_CHECKING:
    from gankit.gan import GAN


@dataclass(eq=False)
class Joint:
    """Brings the player "encoder", the code ``batch.extra["code"]`` = E(x) (B, z_dim), and the joint view."""

    encoder: Annotated[str | None, "your own: module:factory or file.py:factory(shape, z_dim)"] = None

    @hookimpl
    def players(self, gan: GAN) -> dict[str, Player]:
        """E, which maps a sample to a latent; its range is the prior's: tanh for a uniform latent, linear for a normal."""
        return {"encoder": Player(self.make_encoder(gan), "g")}

    def make_encoder(self, gan: GAN) -> nn.Module:
        """The encoder's module; global random numbers are seeded by the caller."""
        if self.encoder:
            from gankit.gan import call_with_accepted
            from gankit.plugins import load_object

            factory, _ = load_object(self.encoder)
            module: nn.Module = call_with_accepted(
                factory, shape=gan.shape, z_dim=gan.latent.dim, latent=gan.latent.kind
            )
            return module
        return networks.encoder(gan.shape, gan.latent.dim, latent=gan.latent.kind, **gan.architecture)

    @hookimpl
    def setup(self, gan: GAN) -> None:
        """Let G's loss act on both sides of the pair, for E gets its gradient from the real one."""
        gan.loss = gan.loss.symmetric()

    @hookimpl(wrapper=True)
    def sample(self, gan: GAN) -> Generator[None, Batch, Batch]:
        """Add the code of the real samples, ``extra["code"]``."""
        batch = yield
        code = gan.players["encoder"].module(batch.real)
        if code.shape != batch.z.shape:
            raise UsageError(
                f"the encoder gives codes of shape {tuple(code.shape[1:])}, the latent is {tuple(batch.z.shape[1:])}"
            )
        return batch._replace(extra={**batch.extra, "code": code})

    @hookimpl(wrapper=True)
    def view(self, batch: Batch) -> Generator[None, View, View]:
        """Pairs: (x, E(x)) on the real side, (G(z), z) on the fake one."""
        view = yield
        return View((*view.real, batch.extra["code"]), (*view.fake, batch.z))
