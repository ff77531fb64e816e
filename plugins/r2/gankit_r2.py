"""The R2 gradient penalty (Mescheder et al. 2018, arXiv:1801.04406, eq. 10), as a function and as a gankit plugin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from torch import Tensor

from gankit import View, hookimpl
from gankit.checks import need_per_sample_critic
from gankit.claims import Claims
from gankit.functional import squared_gradient_norm

if TYPE_CHECKING:
    from gankit import GAN


def r2_penalty(logits: Tensor, inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Half the mean over the batch of ||grad_x D(x)||_2^2 at generated x, from logits that are already there.

    Equation 10 of arXiv:1801.04406 without its weight gamma, but with its factor 1/2 (as stylegan3 and R3GAN; the
    paper's own code leaves the 1/2 out, so its 10 is 20 here). The sum runs over all non-batch dimensions.

    logits: (B, ...) of the generated samples; several logits of one sample (a patch critic's map) are averaged. inputs: the
        tensor (B, ...), or the tuple of the critic's arguments, that they were computed from, requiring gradients; of a
        tuple all floating tensors count, in one sum, and others (labels) are left out. No logit may depend on another
        sample (so no batch normalisation).

    Returns a 0-dim tensor with a graph to the critic's parameters, and to G if the inputs carry one. Costs no critic
    forward and one double backward. Raises ValueError if an input did not require gradients.
    """
    return squared_gradient_norm(logits, inputs).mean() / 2


@dataclass(eq=False)
class R2:
    """Flatten the critic at generated samples: a zero-centred penalty on its squared gradient there (R2)."""

    formula: ClassVar[str] = "weight/2 * mean_i ||grad D(G(z_i))||_2^2"
    paper: ClassVar[str] = (
        "Mescheder et al. 2018, Which Training Methods for GANs do actually Converge?, arXiv:1801.04406, eq. 10"
    )
    claims: ClassVar[Claims] = Claims(
        gradient_norm=lambda self, norm, step, steps: (
            self.weight * self.decay_to ** (step / steps) * self.every / 2 * norm**2
        ),
        at="fake",
        per_sample=True,
        non_negative=True,
        deterministic=True,
        stateless=True,
        forwards=0,
        double_backwards=1,
    )

    weight: Annotated[float, "the paper's gamma: half of it multiplies the mean square"] = 10.0
    every: Annotated[int, "apply in every k-th step, k times as strong (lazy regularization)"] = 1
    decay_to: Annotated[
        float, "share of the weight that is left at the end: it falls by the same factor every step"
    ] = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError("weight must not be negative, infinite or NaN")
        if self.every < 1:
            raise ValueError("every must be at least 1")
        if not 0 < self.decay_to <= 1:
            raise ValueError("decay_to must be above 0 and at most 1, which is for a constant weight")

    @hookimpl(trylast=True)
    def setup(self, gan: GAN) -> None:
        """Refuse a critic whose batch norm mixes samples."""
        need_per_sample_critic(gan, "r2")

    @hookimpl
    def pre_d_loss(self, gan: GAN, view: View, fake_logits: Tensor, step: int) -> dict[str, Tensor] | None:
        """The term "r2" from the logits at hand; in a joint view with respect to all floating inputs of the critic."""
        if step % self.every:
            return None
        return {"r2": self.weight * gan.decayed(self.decay_to, step) * self.every * r2_penalty(fake_logits, view.fake)}
