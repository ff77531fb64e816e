"""The joint setting of BiGAN and ALI: an encoder E trained with G, and a critic of pairs (x, z).

The discriminator tells (x, E(x)) from (G(z), z); G and E together minimise the mirrored loss on both sides
(Donahue et al. 2017, arXiv:1605.09782, eq. 3; Dumoulin et al. 2017, arXiv:1606.00704). Plugins that need the setting
inherit :class:`Joint`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from torch import Tensor, nn

from gankit import networks
from gankit.contract import Batch, Player, View
from gankit.errors import UsageError
from gankit.hookspecs import hookimpl

if TYPE_CHECKING:
    from gankit.gan import GAN


def make_encoder(gan: GAN, factory: str | None, *, name: str = "encoder") -> nn.Module:
    """A network from a sample (B, \\*shape) to a latent (B, z_dim), linear for a normal prior, tanh for a uniform one.

    factory: None for the shipped network, or the user's own as ``module:factory`` or ``file.py:factory``, which asks by
    name for any of ``shape``, ``z_dim``, ``latent``. name: what messages call it. It is initialised from the global
    random generator, so call this inside the hook ``players``. Raises UsageError for a factory that makes no module.
    """
    if factory is None:
        return networks.encoder(gan.shape, gan.latent.dim, latent=gan.latent.kind, **gan.architecture)
    from gankit.gan import call_with_accepted
    from gankit.plugins import load_object

    function, _ = load_object(factory)
    module = call_with_accepted(function, shape=gan.shape, z_dim=gan.latent.dim, latent=gan.latent.kind)
    if not isinstance(module, nn.Module):
        raise UsageError(f"the {name} factory {factory!r} returned a {type(module).__name__}, not a torch Module")
    return module


def encode(encoder: nn.Module, x: Tensor, z: Tensor, *, name: str = "encoder") -> Tensor:
    """The codes of x, (B, z_dim) like z; UsageError if they have another shape."""
    code: Tensor = encoder(x)
    if code.shape != z.shape:
        raise UsageError(f"the {name} gives codes of shape {tuple(code.shape[1:])}, the latent is {tuple(z.shape[1:])}")
    return code


def pairs(view: View, code: Tensor, z: Tensor) -> View:
    """The view with a code of the real samples on the real side and z on the fake side, as last arguments."""
    return View((*view.real, code), (*view.fake, z))


@dataclass(eq=False)
class Joint:
    """Brings the player "encoder", the code ``batch.extra["code"]`` = E(x) (B, z_dim), and the joint view."""

    encoder: Annotated[str | None, "your own: module:factory or file.py:factory(shape, z_dim)"] = None

    @hookimpl
    def players(self, gan: GAN) -> dict[str, Player]:
        """E, which maps a sample to a latent; its range is the prior's: tanh for a uniform latent, linear for a normal."""
        return {"encoder": Player(make_encoder(gan, self.encoder), "g")}

    @hookimpl
    def setup(self, gan: GAN) -> None:
        """Let G's loss act on both sides of the pair, for E gets its gradient from the real one."""
        gan.loss = gan.loss.symmetric()

    @hookimpl(wrapper=True)
    def sample(self, gan: GAN) -> Generator[None, Batch, Batch]:
        """Add the code of the real samples, ``extra["code"]``."""
        batch = yield
        code = encode(gan.players["encoder"].module, batch.real, batch.z)
        return batch._replace(extra={**batch.extra, "code": code})

    @hookimpl(wrapper=True)
    def view(self, batch: Batch) -> Generator[None, View, View]:
        """Pairs: (x, E(x)) on the real side, (G(z), z) on the fake one."""
        view = yield
        return pairs(view, batch.extra["code"], batch.z)
