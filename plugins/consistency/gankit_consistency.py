"""Consistency regularization, CR (Zhang et al. 2020, arXiv:1910.12027) and bCR (Zhao et al. 2021, arXiv:2002.04724)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor

from gankit import UsageError, View, hookimpl
from gankit.claims import Claims

if TYPE_CHECKING:
    from gankit import GAN

Augment = Callable[[Tensor, torch.Generator | None], Tensor]
"""T: samples (B, ...) and a source of randomness to samples of the same shape, differentiable."""


def _reflected(position: Tensor, n: int) -> Tensor:
    """Positions outside 0..n-1 mirrored back at the edge pixels, which are not repeated."""
    return (n - 1) - ((n - 1) - position.abs()).abs()


def shift_and_flip(x: Tensor, generator: torch.Generator | None = None, *, shift: int = 4, flip: bool = True) -> Tensor:
    """Shift each image by up to ``shift`` pixels in both directions and mirror half of them left to right.

    Every sample has its own draw: two whole numbers, uniform in -shift..shift, and a coin. What a shift uncovers is the
    reflection of the image at its edge. All channels move together, also those of a pack.

    x: (B, C, H, W). generator: source of the draws; default: torch's global one. shift: below both H and W. Returns the
    same shape; every value is a value of x, with its graph. Raises ValueError for other shapes and larger shifts.
    """
    if x.dim() != 4 or not 0 <= shift < min(x.shape[2:]):
        raise ValueError(f"images (B, C, H, W) can be shifted by less than their side, not {tuple(x.shape)} by {shift}")
    (batch, channels, height, width), device = x.shape, x.device
    dy, dx = torch.randint(-shift, shift + 1, (2, batch, 1), generator=generator, device=device)
    coin = torch.rand(batch, 1, generator=generator, device=device) < 0.5
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    if flip:
        columns = torch.where(coin, width - 1 - columns, columns)
    rows, columns = _reflected(rows + dy, height), _reflected(columns + dx, width)
    samples = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    return x[
        samples, torch.arange(channels, device=device).view(1, -1, 1, 1), rows[:, None, :, None], columns[:, None, None]
    ]


def add_noise(x: Tensor, generator: torch.Generator | None = None, *, std: float = 0.01) -> Tensor:
    """The samples plus independent normal noise of standard deviation ``std`` in every element, in units of the data.

    Our choice for vectors; the papers augment images only. x: any floating shape (B, ...). Returns the same shape.
    """
    return x + std * torch.empty_like(x).normal_(generator=generator)


def consistency_penalty(
    critic: Callable[..., Tensor],
    inputs: Tensor | Sequence[Tensor],
    logits: Tensor,
    augment: Augment = shift_and_flip,
    generator: torch.Generator | None = None,
) -> Tensor:
    """mean (D(x) - D(T(x)))^2: the critic shall score a sample and its augmentation alike.

    L_cr of arXiv:1910.12027 at the last layer, the logits, without its weight lambda; bCR (arXiv:2002.04724) adds the
    same for G(z). Gradients go through both terms of the difference.

    critic: from the tensors below to logits of any shape; the mean is over everything. inputs: x, (B, ...), or the tuple
        of the critic's arguments, of which the first is augmented and the others (codes, labels) are shown as they are.
    logits: D(x), as already computed. augment: T, called with the first tensor and the generator. generator: source of T's
        randomness; default: torch's global one.

    Returns a 0-dim tensor with a graph to the critic's parameters, and through T to x if x carries one. Costs one critic
    forward, no double backward. Raises ValueError if T changes the shape.
    """
    x, *rest = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    augmented = augment(x, generator)
    if augmented.shape != x.shape:
        raise ValueError(
            f"an augmentation keeps the shape of the samples, {tuple(x.shape)}, not {tuple(augmented.shape)}"
        )
    return (logits - critic(augmented, *rest)).square().mean()


@dataclass(eq=False)
class Consistency:
    """Let the critic score a sample and its augmentation alike: real ones (CR), or generated ones as well (bCR)."""

    formula: ClassVar[str] = "weight * mean (D(x) - D(T(x)))^2 + fake_weight * mean (D(G(z)) - D(T(G(z))))^2"
    paper: ClassVar[str] = (
        "Zhang et al. 2020, Consistency Regularization for GANs, arXiv:1910.12027; "
        "Zhao et al. 2021, Improved Consistency Regularization for GANs, arXiv:2002.04724"
    )
    claims: ClassVar[Claims] = Claims(per_sample=True, non_negative=True, forwards=1, double_backwards=0)

    weight: Annotated[float, "lambda of CR, lambda_real of bCR"] = 10.0
    fake_weight: Annotated[float, "lambda_fake of bCR, which uses 10; 0 is CR"] = 0.0
    shift: Annotated[int, "images: largest shift in pixels, each way"] = 4
    flip: Annotated[bool, "images: mirror half of them left to right; not for digits or letters"] = True
    noise: Annotated[float, "vectors: standard deviation of the noise, in units of the data (ours)"] = 0.01
    augmentation: Annotated[str | None, "your own T: module:callable or file.py:callable(x, generator)"] = None

    def __post_init__(self) -> None:
        if not all(0 <= number < math.inf for number in (self.weight, self.fake_weight, self.shift, self.noise)):
            raise ValueError("weight, fake_weight, shift and noise must not be negative, infinite or NaN")
        self._augment: Augment = add_noise

    @hookimpl
    def setup(self, gan: GAN) -> None:
        """Choose T by the shape of the data, or load the user's."""
        if self.augmentation:
            from gankit.plugins import load_object

            self._augment, _ = load_object(self.augmentation)
            if not callable(self._augment):
                raise UsageError(f"consistency.augmentation {self.augmentation!r} must be callable as T(x, generator)")
        elif len(gan.shape) != 3:
            self._augment = partial(add_noise, std=self.noise)
        elif self.shift < min(gan.shape[1:]):
            self._augment = partial(shift_and_flip, shift=self.shift, flip=self.flip)
        else:
            raise UsageError(f"consistency.shift must be below the images' side, {min(gan.shape[1:])}: make it smaller")

    @hookimpl
    def pre_d_loss(
        self, gan: GAN, critic: Callable[..., Tensor], view: View, real_logits: Tensor, fake_logits: Tensor
    ) -> dict[str, Tensor]:
        """The terms "consistency_real" and "consistency_fake", each where its weight is not 0."""
        sides = {
            "consistency_real": (self.weight, view.real, real_logits),
            "consistency_fake": (self.fake_weight, view.fake, fake_logits),
        }
        return {
            name: weight * consistency_penalty(critic, inputs, logits, self._augment, gan.rng(self))
            for name, (weight, inputs, logits) in sides.items()
            if weight
        }
