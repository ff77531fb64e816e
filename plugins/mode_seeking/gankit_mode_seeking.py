"""Mode seeking (MSGAN: Mao et al. 2019, arXiv:1903.05628, section 3.2), as a function and as a gankit plugin."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from torch import Tensor

from gankit import Batch, hookimpl
from gankit.functional import extra_pass

if TYPE_CHECKING:
    from gankit import GAN


def mode_seeking(
    fake1: Tensor, fake2: Tensor, z1: Tensor, z2: Tensor, *, form: str = "inverse", eps: float = 1e-5
) -> Tensor:
    """What G minimises so that distant latents give distant samples: d(G(z1), G(z2)) / d(z1, z2) is to be large.

    d is the mean absolute difference (the L1 distance divided by the number of entries, so that the ratio does not grow
    with the size of an image). With pairs i of a batch:

        "inverse":  1 / (mean_i d(fake1_i, fake2_i) / mean_i d(z1_i, z2_i) + eps)      the authors' code
        "ratio":    - mean_i d(fake1_i, fake2_i) / (d(z1_i, z2_i) + eps)               section 3.2 of arXiv:1903.05628

    The paper maximises the ratio itself, which has no bound where samples have none; the code minimises its inverse,
    bounded by 0, strongest at a collapse, where it is 1 / eps.

    fake1, fake2: (B, ...) generated from z1, z2: (B, z_dim). Returns a 0-dim tensor with a graph to all of them. No critic
    forward. Raises ValueError if shapes do not match or the form is unknown.
    """
    if fake1.shape != fake2.shape or z1.shape != z2.shape or len(fake1) != len(z1):
        shapes = ", ".join(str(tuple(t.shape)) for t in (fake1, fake2, z1, z2))
        raise ValueError(f"mode seeking compares two batches of equal shapes, not {shapes}")
    if form == "inverse":
        return 1 / ((fake1 - fake2).abs().mean() / (z1 - z2).abs().mean() + eps)
    if form == "ratio":
        samples, latents = ((a - b).abs().flatten(1).mean(1) for a, b in ((fake1, fake2), (z1, z2)))
        return -(samples / (latents + eps)).mean()
    raise ValueError(f"form is 'inverse' or 'ratio', not {form!r}")


@dataclass(eq=False)
class ModeSeeking:
    """Drive the samples of different latents apart, relative to the latents' distance, so that G does not collapse."""

    formula: ClassVar[str] = (
        "weight / (r + eps)  [form=ratio: -weight * r],  r = d(G(z1), G(z2)) / d(z1, z2),  d: mean absolute difference"
    )
    paper: ClassVar[str] = (
        "Mao et al. 2019, Mode Seeking Generative Adversarial Networks for Diverse Image Synthesis, arXiv:1903.05628, "
        "section 3.2"
    )

    weight: Annotated[float, "lambda_ms; 1 in the paper"] = 1.0
    form: Annotated[Literal["inverse", "ratio"], "inverse as in the authors' code, or the paper's ratio"] = "inverse"
    eps: Annotated[float, "keeps divisions finite; 1/eps is the largest value of the inverse form"] = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError("weight must not be negative, infinite or NaN")
        if not self.eps > 0:
            raise ValueError("eps must be positive")
        if self.form not in ("inverse", "ratio"):
            raise ValueError(f"form is 'inverse' or 'ratio', not {self.form!r}")

    @hookimpl
    def post_g_loss(self, gan: GAN, batch: Batch) -> dict[str, Tensor] | None:
        """The term "mode_seeking" of the update's own samples and as many from latents of the plugin's own stream."""
        if self.weight == 0:
            return None
        z = gan.latent.draw(len(batch.z), gan.rng(self))
        fake = extra_pass(gan.generator, z)
        return {"mode_seeking": self.weight * mode_seeking(batch.fake, fake, batch.z, z, form=self.form, eps=self.eps)}
