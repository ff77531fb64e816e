"""Gradient penalty of DRAGAN (Kodali et al. 2017, arXiv:1705.07215), as a function and as a gankit plugin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from torch import Tensor

from gankit import View, hookimpl
from gankit.checks import need_per_sample_critic
from gankit.claims import Claims
from gankit.functional import input_gradients, mixing_weights, norm_per_sample

if TYPE_CHECKING:
    from gankit import GAN

NOISES = ("paper", "code")


def perturb(
    inputs: Sequence[Tensor],
    *,
    noise: str = "paper",
    scale: float = 0.5,
    c: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, ...]:
    """Points in a neighbourhood of real data, x + delta, where DRAGAN penalises the critic's gradient.

    noise "paper": delta ~ N(0, c I), independent in every element; without ``c`` its standard deviation is
        scale std(x), so that the neighbourhood follows the range of the data.
    noise "code": delta = a scale std(x) U, with U ~ U(0, 1) in every element and one a ~ U(0, 1) per sample: the
        official notebook, which mixes x with a noisy copy of it. Never negative, so the points lie on one side of x.

    inputs: tensors (B, ...), the critic's arguments; every floating one is moved, by its own std, others (labels) are
        returned as they are. std(x) is one number per tensor: the population standard deviation (no -1) over all its
        elements, batch included, without a gradient. scale: relative to std(x). c: variance of the paper's noise, in
        squared units of the data, which "code" does not have. generator: source of the noise; default: torch's global one.

    Returns tensors that require gradients and keep the graph of the inputs, if there is one. Raises ValueError for an
    unknown noise, for a scale or c that is negative, infinite or NaN, for a c with noise "code", and if no tensor is
    floating.
    """
    check(noise, scale, c)
    floating = next((t for t in inputs if t.is_floating_point()), None)
    if floating is None:
        raise ValueError("there is nothing to perturb: give at least one floating tensor")
    # one per sample for all of its tensors: they are moved along one segment
    mix = mixing_weights(floating, generator).flatten() if noise == "code" else None

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        size = scale * x.detach().std(correction=0) if c is None else math.sqrt(c)
        if mix is None:
            delta = size * torch.empty_like(x).normal_(generator=generator)
        else:
            a = mix.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
            delta = a * size * torch.empty_like(x).uniform_(generator=generator)
        point = x + delta
        return point if point.requires_grad else point.requires_grad_()

    return tuple(map(moved, inputs))


def check(noise: str, scale: float, c: float | None) -> None:
    """ValueError for what :func:`perturb` has no noise for."""
    if noise not in NOISES:
        raise ValueError(f"noise is 'paper' or 'code', not {noise!r}")
    if not (0 <= scale < math.inf and (c is None or 0 <= c < math.inf)):
        raise ValueError("scale and c must not be negative, infinite or NaN")
    if c is not None and noise == "code":
        raise ValueError("c is the variance of the paper's noise: with noise=code set scale instead")


def dragan_penalty(
    critic: Callable[..., Tensor],
    real: Tensor | Sequence[Tensor],
    *,
    noise: str = "paper",
    scale: float = 0.5,
    c: float | None = None,
    center: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over the batch of (||grad D(x + delta)||_2 - center)^2 around real x only (arXiv:1705.07215).

    Without its weight lambda; ``center`` is the paper's k. The norm runs over all non-batch dimensions.

    critic: from the tensors below to logits (B, ...), differentiable twice, no logit depending on another sample (so no
        batch normalisation). real: (B, ...), or the tuple of the critic's arguments, whose floating tensors are moved
        alike and share one norm. noise, scale, c, generator: see :func:`perturb`.

    Returns a 0-dim tensor with a graph to the critic's parameters. Costs one critic forward and one double backward.
    Raises ValueError as :func:`perturb` does.
    """
    inputs = (real,) if isinstance(real, Tensor) else tuple(real)
    points = perturb(inputs, noise=noise, scale=scale, c=c, generator=generator)
    return (norm_per_sample(input_gradients(critic(*points), points)) - center).square().mean()


@dataclass(eq=False)
class DRAGAN:
    """Pull the norm of the critic's gradient to ``center`` in a neighbourhood of the real samples (DRAGAN).

    A sample's gradient is its own (``per_sample``), so the critic must not mix samples. One exception: the size of the noise
    is by default the batch's, by std(x); with ``c`` it is fixed.
    """

    formula: ClassVar[str] = "weight * mean_i (||grad D(x_i + delta_i)||_2 - center)^2,  delta ~ N(0, c I)"
    paper: ClassVar[str] = "Kodali et al. 2017, On Convergence and Stability of GANs (DRAGAN), arXiv:1705.07215"
    claims: ClassVar[Claims] = Claims(
        gradient_norm=lambda self, norm: self.weight * self.every * (norm - self.center) ** 2,
        at="near_real",
        per_sample=True,
        non_negative=True,
        stateless=True,
        forwards=1,
        double_backwards=1,
    )

    weight: Annotated[float, "the paper's lambda"] = 10.0
    center: Annotated[float, "norm asked for, the paper's k"] = 1.0
    noise: Annotated[
        Literal["paper", "code"], "normal as in the paper, or uniform and one-sided as in the official code"
    ] = "paper"
    scale: Annotated[float, "size of the noise, in standard deviations of the real batch"] = 0.5
    c: Annotated[float | None, "variance of the paper's noise, in squared data units; none: (scale std)^2"] = None
    every: Annotated[int, "apply in every k-th step, k times as strong (lazy regularization)"] = 1

    def __post_init__(self) -> None:
        if not (0 <= self.weight < math.inf and 0 <= self.center < math.inf):
            raise ValueError("weight and center must not be negative, infinite or NaN")
        check(self.noise, self.scale, self.c)
        if self.c is not None and self.scale != type(self).scale:
            raise ValueError("c sets the size of the noise by itself: leave out scale")
        if self.every < 1:
            raise ValueError("every must be at least 1")

    @hookimpl(trylast=True)
    def setup(self, gan: GAN) -> None:
        """Refuse a critic whose batch norm mixes samples."""
        need_per_sample_critic(gan, "dragan")

    @hookimpl
    def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], view: View, step: int) -> dict[str, Tensor] | None:
        """The term "dragan" around what the critic is shown as real: around packs, and around pairs in a joint view."""
        if step % self.every:
            return None
        penalty = dragan_penalty(
            critic,
            view.real,
            noise=self.noise,
            scale=self.scale,
            c=self.c,
            center=self.center,
            generator=gan.rng(self),
        )
        return {"dragan": self.weight * self.every * penalty}
