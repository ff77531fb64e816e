"""Gradient penalty of WGAN-GP (Gulrajani et al. 2017, arXiv:1704.00028, eq. 3), as a function and as a gankit plugin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor

from gankit import View, hookimpl
from gankit.checks import need_per_sample_critic
from gankit.claims import Claims
from gankit.functional import input_gradients, interpolate, norm_per_sample

if TYPE_CHECKING:
    from gankit import GAN


def gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor | Sequence[Tensor],
    fake: Tensor | Sequence[Tensor],
    *,
    center: float = 1.0,
    one_sided: bool = False,
    detach: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over the batch of (||grad D(x~)||_2 - center)^2 at x~ = u real + (1 - u) fake, one u ~ U(0, 1) per sample.

    Equation 3 of arXiv:1704.00028 without its weight lambda. The norm runs over all non-batch dimensions.

    critic: from the tensors below to logits (B, ...), differentiable twice, no logit depending on another sample (so no
        batch normalisation). real, fake: (B, ...) each, or tuples of such tensors, the critic's arguments; of a tuple
        all floating tensors are mixed with one u per sample and share one norm, others (labels) are taken from real.
    center: the norm asked for; 1 for WGAN-GP, 0 for a zero-centred penalty.
    one_sided: penalise norms above ``center`` only (WGAN-LP: Petzka et al. 2018, arXiv:1709.08894, eq. 8).
    detach: keep the penalty from real and fake, so that it trains the critic alone; False for unrolling through it.
    generator: source of u; default: torch's global one.

    Returns a 0-dim tensor with a graph to the critic's parameters. Costs one critic forward and one double backward.
    Raises ValueError if real and fake differ in shape.
    """
    real = (real,) if isinstance(real, Tensor) else tuple(real)
    fake = (fake,) if isinstance(fake, Tensor) else tuple(fake)
    shapes = [tuple(t.shape) for t in real], [tuple(t.shape) for t in fake]
    if shapes[0] != shapes[1]:
        raise ValueError(f"real and fake must have the same shapes, not {shapes[0]} and {shapes[1]}")
    x = interpolate(real, fake, generator, detach=detach)
    excess = norm_per_sample(input_gradients(critic(*x), x)) - center
    return (excess.relu() if one_sided else excess).square().mean()


@dataclass(eq=False)
class GradientPenalty:
    """Pull the norm of the critic's gradient to ``center`` between real and generated samples (WGAN-GP)."""

    formula: ClassVar[str] = "weight * mean_i (||grad D(x~_i)||_2 - center)^2,  x~ = u x + (1 - u) G(z)"
    paper: ClassVar[str] = "Gulrajani et al. 2017, Improved Training of Wasserstein GANs, arXiv:1704.00028, eq. 3"
    claims: ClassVar[Claims] = Claims(
        gradient_norm=lambda self, norm: (
            self.weight * self.every * ((norm - self.center).relu() if self.one_sided else norm - self.center) ** 2
        ),
        at="between",
        per_sample=True,
        non_negative=True,
        stateless=True,
        forwards=1,
        double_backwards=1,
    )

    weight: Annotated[float, "lambda of eq. 3"] = 10.0
    center: Annotated[float, "norm asked for: 1 WGAN-GP, 0 zero-centred"] = 1.0
    one_sided: Annotated[bool, "penalise only norms above center (WGAN-LP, arXiv:1709.08894)"] = False
    every: Annotated[int, "apply in every k-th step, k times as strong (lazy regularization)"] = 1

    def __post_init__(self) -> None:
        if not (0 <= self.weight < math.inf and 0 <= self.center < math.inf):
            raise ValueError("weight and center must not be negative, infinite or NaN")
        if self.every < 1:
            raise ValueError("every must be at least 1")

    @hookimpl(trylast=True)
    def setup(self, gan: GAN) -> None:
        """Refuse a critic whose batch norm mixes samples."""
        need_per_sample_critic(gan, "gradient_penalty")

    @hookimpl
    def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], view: View, step: int) -> dict[str, Tensor] | None:
        """The term "gradient_penalty" on what the critic is shown: per pack under packing, on pairs in a joint view."""
        if step % self.every:
            return None
        penalty = gradient_penalty(
            critic,
            view.real,
            view.fake,
            center=self.center,
            one_sided=self.one_sided,
            detach=False,
            generator=gan.rng(self),
        )
        return {"gradient_penalty": self.weight * self.every * penalty}
