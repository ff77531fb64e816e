"""Pair-wise gradient penalty of "No Modes left behind" (2018, arXiv:1802.00771), as a function and as a gankit plugin."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from torch import Tensor

from gankit import Batch, hookimpl
from gankit.checks import need_per_sample_critic
from gankit.functional import extra_pass, input_gradients, interpolate, norm_per_sample
from gankit.joint import Joint

if TYPE_CHECKING:
    from gankit import GAN

REDUCTIONS = ("mean", "sum")


def unit_vectors(difference: Tensor) -> Tensor:
    """difference / ||difference||_2 per sample, over all non-batch dimensions; 0 where the difference is 0.

    difference: (B, ...). Returns the same shape, without a graph.
    """
    difference = difference.detach()
    norm = norm_per_sample((difference,)).view(-1, *(1,) * (difference.dim() - 1))
    return torch.where(norm > 0, difference / norm.where(norm > 0, torch.ones_like(norm)), torch.zeros_like(norm))


def pairwise_gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor,
    reconstruction: Tensor,
    *given: Tensor,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Push grad_x D on the segment from G(E(x)) to x towards the unit vector that points to x (arXiv:1802.00771).

    With xhat = G(E(x)), x~ = u x + (1 - u) xhat and one u ~ U(0, 1) per sample, the penalty is

        mean_i mean_f (grad_x~ D(x~_i, given_i) - t_i)_f^2,   t_i = (x_i - xhat_i) / ||x_i - xhat_i||_2

    with the mean over the batch i and over all non-batch dimensions f ("sum": the sum over f). Not only the norm but the
    direction of the gradient is asked for; t_i = 0 where xhat_i = x_i.

    critic: from (x, \\*given) to logits (B, ...), larger = more real, differentiable twice, no logit depending on
        another sample. real, reconstruction: (B, ...) of one shape. given: the critic's further arguments, E(x); held
        fixed. All of them are detached: the penalty trains the critic alone. generator: source of u.

    Returns a 0-dim tensor with a graph to the critic's parameters. Costs one critic forward and one double backward, and
    whatever made ``reconstruction``. Raises ValueError if the shapes differ or the reduction is unknown.
    """
    if real.shape != reconstruction.shape:
        raise ValueError(f"a reconstruction has the shape of x, {tuple(real.shape)}, not {tuple(reconstruction.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is 'mean' or 'sum', not {reduction!r}")
    (x,) = interpolate((real,), (reconstruction,), generator)
    (gradient,) = input_gradients(critic(x, *(t.detach() for t in given)), (x,))
    squares = (gradient - unit_vectors(real - reconstruction)).square().unsqueeze(1).flatten(1)
    return (squares.mean(1) if reduction == "mean" else squares.sum(1)).mean()


@dataclass(eq=False)
class PairwiseGP(Joint):
    """BiGAN whose critic slopes from each reconstruction G(E(x)) up to x, so that a lost mode pulls G back to it."""

    formula: ClassVar[str] = (
        "weight * mean_i mean_f (grad_x~ D(x~_i, e_i) - t_i)_f^2,  e = E(x), xhat = G(e), "
        "x~ = u x + (1 - u) xhat, t = (x - xhat) / ||x - xhat||"
    )
    paper: ClassVar[str] = (
        "No Modes left behind: Capturing the data distribution effectively using GANs, 2018, arXiv:1802.00771"
    )

    weight: Annotated[float, "weight of the penalty; the paper uses 1 for every data set"] = 1.0
    reduction: Annotated[Literal["mean", "sum"], "over features: mean as in the paper, or sum"] = "mean"
    every: Annotated[int, "apply in every k-th step, k times as strong (lazy regularization)"] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError("weight must not be negative, infinite or NaN")
        if self.every < 1:
            raise ValueError("every must be at least 1")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction is 'mean' or 'sum', not {self.reduction!r}")

    @hookimpl(trylast=True)
    def setup(self, gan: GAN) -> None:
        """As for a BiGAN; refuse a critic whose batch norm mixes samples."""
        super().setup(gan)
        need_per_sample_critic(gan, "pairwise_gp")

    @hookimpl
    def pre_d_loss(self, gan: GAN, critic: Callable[..., Tensor], batch: Batch, step: int) -> dict[str, Tensor] | None:
        """The term "pairwise_gp"; the pair (x, xhat) is shown as the critic sees samples, so packing applies to it too."""
        if step % self.every:
            return None
        code = batch.extra["code"].detach()
        with torch.no_grad():
            reconstructed = extra_pass(gan.generator, code)
            pair = batch._replace(fake=reconstructed, z=code, extra={**batch.extra, "code": code})
            real, reconstruction = gan.hook.view(gan=gan, batch=pair, phase="d", step=step)
        penalty = pairwise_gradient_penalty(
            critic, real[0], reconstruction[0], *real[1:], reduction=self.reduction, generator=gan.rng(self)
        )
        return {"pairwise_gp": self.weight * self.every * penalty}
