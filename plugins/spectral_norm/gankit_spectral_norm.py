"""Spectral normalisation (Miyato et al. 2018, arXiv:1802.05957), as functions and as a gankit plugin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from gankit import UsageError, hookimpl
from gankit.checks import spectral_norms
from gankit.networks import folded

if TYPE_CHECKING:
    from gankit import GAN

M = TypeVar("M", bound=nn.Module)

__all__ = ["SpectralNorm", "folded", "layers", "normalize"]

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def layers(module: nn.Module) -> list[nn.Module]:
    """The linear and (transposed) convolutional layers inside a module, each once, in the order of the module."""
    return [layer for layer in module.modules() if isinstance(layer, LAYERS)]


def normalize(
    module: M, *, power_iterations: int = 1, eps: float = 1e-12, generator: torch.Generator | None = None
) -> M:
    """Divide the weight of every linear and convolutional layer by its largest singular value, from now on.

        W_SN = W / sigma(W),   sigma(W) = u^T W v,   v <- W^T u / ||W^T u||,  u <- W v / ||W v||

    Equation 8 and algorithm 1 of arXiv:1802.05957. W is the weight as a matrix (outputs, everything else), for a
    convolution (out, in kh kw), which bounds that matrix and not the operator on images. Gradients go through sigma,
    with u and v held fixed. Biases, embeddings and norm layers are left alone.

    module: changed in place and returned; lazy layers must have their shapes. The parameter ``weight`` of a layer is
        afterwards called ``parametrizations.weight.original`` and has buffers ``parametrizations.weight.0._u`` and
        ``._v``, so weights saved before no longer fit; an optimiser made before still trains it.
    power_iterations: per forward pass in training mode; none in evaluation mode. 15 are done at once, here.
    eps: added to nothing but the length that u and v are divided by, when that is smaller.
    generator: source of the first u and v; default: torch's global one.

    Costs two matrix-vector products per layer, iteration and forward pass. Raises ValueError if the module has no such
    layer, one of them already has a spectral norm, or two of them share a weight.
    """
    found = layers(module)
    already = spectral_norms(module)
    if not found:
        raise ValueError(f"{type(module).__name__} has no linear or convolutional layer to normalise")
    if already:
        raise ValueError(f"layer {already[0]!r} already has a spectral norm: a second one would be for nothing")
    weights = [layer.weight for layer in found]  # held, for computed ones are new at each look and ids come again
    if len(set(map(id, weights))) < len(weights):
        raise ValueError("two layers share one weight, which normalising them would separate")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        for layer in found:
            parametrizations.spectral_norm(layer, n_power_iterations=power_iterations, eps=eps)
    return module


@dataclass(eq=False)
class SpectralNorm:
    """Divide each weight of the discriminator by its spectral norm, which bounds how steep it can be (SNGAN)."""

    formula: ClassVar[str] = "W_SN = W / sigma(W),  sigma(W) = max ||W h||_2 / ||h||_2, by power iteration"
    paper: ClassVar[str] = "Miyato et al. 2018, Spectral Normalization for GANs, arXiv:1802.05957, eq. 8, algorithm 1"

    on: Annotated[
        Literal["d", "g", "both"], "networks: trained with the discriminator, with the generator (SAGAN), all"
    ] = "d"
    power_iterations: Annotated[int, "per forward pass of a network in training"] = 1
    eps: Annotated[float, "lower bound of the lengths that u and v are divided by"] = 1e-12

    def __post_init__(self) -> None:
        if self.power_iterations < 1:
            raise ValueError("power_iterations must be at least 1")
        if not self.eps > 0:
            raise ValueError("eps must be positive")
        if self.on not in ("d", "g", "both"):
            raise ValueError(f"on is 'd', 'g' or 'both', not {self.on!r}")

    @hookimpl
    def setup(self, gan: GAN) -> None:
        """Normalise every player of the chosen phases, once its shapes are known and before it has an optimiser."""
        phases = ("d", "g") if self.on == "both" else (self.on,)
        for name, player in gan.players.items():
            if player.phase not in phases:
                continue
            try:
                normalize(player.module, power_iterations=self.power_iterations, eps=self.eps, generator=gan.rng(self))
            except ValueError as error:
                raise UsageError(f"spectral_norm cannot be used on the {name}: {error}") from error

    @hookimpl(trylast=True)
    @torch.no_grad()
    def post_step(self, gan: GAN, phase: str) -> None:
        """Let averaged networks have u and v of their own averaged weights, not averages of unit vectors."""
        if phase == "d" or self.on == "d":
            return
        for average in gan.averages.values():
            for layer in layers(average):
                if parametrize.is_parametrized(layer, "weight") and spectral_norms(layer):
                    layer.parametrizations["weight"].train()  # type: ignore[index, union-attr]
                    _ = layer.weight  # one power iteration
