"""Two time-scale update rule (Heusel et al. 2017, arXiv:1706.08500): known pairs of learning rates, and a gankit plugin."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from gankit import Optim, UsageError, hookimpl

if TYPE_CHECKING:
    from gankit import GAN

Preset = Literal["sagan", "wgan_gp", "dcgan_celeba", "dcgan_cifar10", "dcgan_svhn", "dcgan_lsun", "none"]

# D's rate, G's rate, Adam's betas of both
PRESETS: dict[str, tuple[float, float, tuple[float, float]]] = {
    "sagan": (4e-4, 1e-4, (0.0, 0.9)),
    "wgan_gp": (3e-4, 1e-4, (0.0, 0.9)),
    "dcgan_celeba": (1e-5, 5e-4, (0.5, 0.999)),
    "dcgan_cifar10": (1e-4, 5e-4, (0.5, 0.999)),
    "dcgan_svhn": (1e-5, 1e-4, (0.5, 0.999)),
    "dcgan_lsun": (1e-5, 1e-4, (0.5, 0.999)),
}


def settings(preset: str = "sagan") -> dict[str, Optim]:
    """Adam's settings of a published pair, by phase: "d" for the discriminator, "g" for the generator.

    preset: "sagan" (Zhang et al. 2018, arXiv:1805.08318, section 4: with spectral norm in both networks); of table 1 of
        arXiv:1706.08500 "wgan_gp" (with one D step instead of five; one version of the authors' code has its rates the
        other way round, the table and their last version have these) and, with DCGAN's momenta, "dcgan_celeba",
        "dcgan_cifar10", "dcgan_svhn", "dcgan_lsun". These last have the *smaller* rate in D.

    Raises UsageError for another name.
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no pair of rates {preset!r}: choose from {', '.join(PRESETS)}")
    lr_d, lr_g, betas = PRESETS[preset]
    return {"d": Optim(lr_d, betas), "g": Optim(lr_g, betas)}


@dataclass(eq=False)
class TTUR:
    """Give the two networks learning rates of their own, one update each: published pairs, or yours."""

    formula: ClassVar[str] = "w += b g_D,  theta += a g_G,  with b for the discriminator unequal to a for the generator"
    paper: ClassVar[str] = "Heusel et al. 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500, table 1"

    preset: Annotated[Preset, "published rates and momenta; none: those of the run"] = "sagan"
    lr_d: Annotated[float | None, "D's rate instead of the preset's"] = None
    lr_g: Annotated[float | None, "G's rate instead of the preset's"] = None
    beta1: Annotated[float | None, "Adam's first momentum instead of the preset's"] = None
    beta2: Annotated[float | None, "Adam's second momentum instead of the preset's"] = None

    def __post_init__(self) -> None:
        if self.preset != "none":
            settings(self.preset)
        if any(lr is not None and not 0 < lr < math.inf for lr in (self.lr_d, self.lr_g)):
            raise ValueError("lr_d and lr_g must be positive and finite")
        if any(beta is not None and not 0 <= beta < 1 for beta in (self.beta1, self.beta2)):
            raise ValueError("beta1 and beta2 must be at least 0 and less than 1")

    @hookimpl
    def setup(self, gan: GAN) -> None:
        """Set the rates and momenta that the optimisers are made with and that a decay starts from."""
        chosen = gan.optim if self.preset == "none" else settings(self.preset)
        for phase, lr in (("d", self.lr_d), ("g", self.lr_g)):
            old = chosen[phase]
            beta1, beta2 = (
                was if own is None else own for own, was in zip((self.beta1, self.beta2), old.betas, strict=True)
            )
            lr = old.lr if lr is None else lr
            gan.optim[phase] = replace(gan.optim[phase], lr=lr, betas=(beta1, beta2))
