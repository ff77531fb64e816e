"""The joint setting of BiGAN and ALI: an encoder E trained with G, and a critic of pairs (x, z).

The discriminator tells (x, E(x)) from (G(z), z); G and E together minimise the mirrored loss on both sides
(Donahue et al. 2017, arXiv:1605.09782, eq. 3; Dumoulin et al. 2017, arXiv:1606.00704). BiGAN's E is a function of x, ALI's
draws z from a normal distribution whose mean and variance depend on x: ``stochastic``. Plugins that need the setting inherit
:class:`Joint`. :func:`reconstruct` is G(E(x)), for every plugin that brings an encoder.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn

from gankit import networks
from gankit.contract import Batch, Player, View
from gankit.errors import UsageError
from gankit.hookspecs import hookimpl
from gankit.structure import evaluating

if TYPE_CHECKING:
    from gankit.gan import GAN

CHUNK = 256  # samples in one pass


def make_encoder(gan: GAN, factory: str | None, *, name: str = "encoder", stochastic: bool = False) -> nn.Module:
    """A network from a sample (B, \\*shape) to a latent (B, z_dim), linear for a normal prior, tanh for a uniform one.

    factory: None for the GAN's own encoder, or the shipped network where it has none; or the user's as ``module:factory`` or
        ``file.py:factory``, which asks by name for any of ``shape``, ``z_dim``, ``latent``. name: what messages call it.
    stochastic: for :func:`reparametrise`, a linear output of twice the size whatever the prior (a factory gets the doubled
        ``z_dim``, and ``latent`` "normal").

    It is initialised from the global random generator, so call this inside the hook ``players``. Raises UsageError for a
    factory that makes no module.
    """
    if factory is None and gan.encoder is not None:
        return gan.encoder
    z_dim, latent = (2 * gan.latent.dim, "normal") if stochastic else (gan.latent.dim, gan.latent.kind)
    if factory is None:
        shipped = networks.encoder(gan.shape, z_dim, latent=latent, **gan.architecture)
        # z as one's own generator takes it, DCGAN's (dim, 1, 1) for one; mean and log-variance stay flat
        shape = None if stochastic or gan.latent.shape == (z_dim,) else gan.latent.shape
        return nn.Sequential(shipped, nn.Unflatten(1, shape)) if shape else shipped
    from gankit.gan import call_with_accepted, need_module
    from gankit.plugins import load_object

    function, _ = load_object(factory)
    made = call_with_accepted(function, shape=gan.shape, z_dim=z_dim, latent=latent)
    return need_module(name, factory, made)


def encode(encoder: nn.Module, x: Tensor, z: Tensor, *, name: str = "encoder") -> Tensor:
    """The codes of x, (B, z_dim) like z; UsageError if they have another shape."""
    code: Tensor = encoder(x)
    if code.shape != z.shape:
        raise UsageError(f"the {name} gives codes of shape {tuple(code.shape[1:])}, the latent is {tuple(z.shape[1:])}")
    return code


def reparametrise(statistics: Tensor, *, tanh: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """Draw z = mean + exp(log_variance / 2) * noise, noise ~ N(0, I): ALI's encoder (arXiv:1606.00704, section 2).

    statistics: (B, 2 z_dim), the mean in the first half of the coordinates, the logarithm of the variance in the second.
    tanh: squash the draw into (-1, 1), the support of a uniform prior; mean and variance are those before. generator: source
    of the noise. Returns (B, z_dim) with a graph to the statistics. Raises ValueError for an odd number of them.
    """
    if statistics.dim() != 2 or statistics.shape[1] % 2:
        raise ValueError(f"mean and log-variance have the shape (B, 2 z_dim), not {tuple(statistics.shape)}")
    mean, log_variance = statistics.chunk(2, dim=1)
    noise = torch.empty_like(mean).normal_(generator=generator)
    z = mean + (log_variance / 2).exp() * noise
    return z.tanh() if tanh else z


def pairs(view: View, code: Tensor, z: Tensor) -> View:
    """The view with a code of the real samples on the real side and z on the fake side, as last arguments."""
    return View((*view.real, code), (*view.fake, z))


def has_encoder(gan: GAN) -> bool:
    """Whether a plugin brings a network from samples to latents: BiGAN's "encoder", VEEGAN's "reconstructor"."""
    return bool({"encoder", "reconstructor"} & set(gan.players))


@torch.no_grad()
def reconstruct(gan: GAN, x: Tensor) -> Tensor:
    """G(E(x)) for samples x (N, \\*shape), with the averaged G where there is one, in evaluation mode.

    E is the player "encoder" or "reconstructor"; of one that gives mean and log-variance (ALI's) the mean counts.
    UsageError where no plugin brings it.
    """
    if not has_encoder(gan):
        raise UsageError(
            "this GAN has no encoder, and G(E(x)) needs one: train with --plugin bigan, pairwise_gp or veegan"
        )
    encoder = (gan.players.get("encoder") or gan.players["reconstructor"]).module
    made = []
    with evaluating(encoder):
        for part in torch.split(x, CHUNK):
            code = encoder(part)
            if code.flatten(1).shape[1] == 2 * gan.latent.dim:
                code = code.chunk(2, dim=1)[0]
                code = code.tanh() if gan.latent.kind == "uniform" else code
            made.append(gan.generate(code.reshape(len(part), *(gan.latent.shape or (gan.latent.dim,)))))
    return torch.cat(made)


def reconstruction_error(gan: GAN, x: Tensor) -> Tensor:
    """Mean over pixels or coordinates of (G(E(x)) - x)^2 for each sample: (N, \\*shape) -> (N,); see :func:`reconstruct`."""
    return (reconstruct(gan, x) - x).square().flatten(1).mean(1)


@dataclass(eq=False)
class Joint:
    """Brings the player "encoder", the code ``batch.extra["code"]`` = E(x) (B, z_dim), and the joint view.

    ``stochastic``: the network gives mean and log-variance, and the code is one draw for each x from the plugin's own
    random stream, squashed by tanh for a uniform prior. This draw is what the critic sees, and what plugins that ask for the
    code get.
    """

    encoder: Annotated[str | None, "your own: module:factory or file.py:factory(shape, z_dim)"] = None
    stochastic: Annotated[bool, "E gives mean and log-variance (2 z_dim outputs) and z is drawn, as in ALI"] = False

    @hookimpl
    def players(self, gan: GAN) -> dict[str, Player]:
        """E, which maps a sample to a latent; its range is the prior's: tanh for a uniform latent, linear for a normal."""
        return {"encoder": Player(make_encoder(gan, self.encoder, stochastic=self.stochastic), "g")}

    @hookimpl
    def setup(self, gan: GAN) -> None:
        """Let G's loss act on both sides of the pair, for E gets its gradient from the real one."""
        gan.loss = gan.loss.symmetric()

    @hookimpl(wrapper=True)
    def sample(self, gan: GAN) -> Generator[None, Batch, Batch]:
        """Add the code of the real samples, ``extra["code"]``."""
        batch = yield
        encoder = gan.players["encoder"].module
        if self.stochastic:
            statistics = encode(encoder, batch.real, batch.z.flatten(1).repeat(1, 2), name="stochastic encoder")
            code = reparametrise(statistics, tanh=gan.latent.kind == "uniform", generator=gan.rng(self))
            code = code.view_as(batch.z)
        else:
            code = encode(encoder, batch.real, batch.z)
        return batch._replace(extra={**batch.extra, "code": code})

    @hookimpl(wrapper=True)
    def view(self, batch: Batch) -> Generator[None, View, View]:
        """Pairs: (x, E(x)) on the real side, (G(z), z) on the fake one."""
        view = yield
        return pairs(view, batch.extra["code"], batch.z)
