"""Differentiable augmentation (Zhao et al. 2020, arXiv:2006.10738), as functions and as a gankit plugin."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor

from gankit import UsageError, View, hookimpl

if TYPE_CHECKING:
    from gankit import GAN

Draw = torch.Generator | None


def colored(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add ``brightness``, scale colours about grey by ``saturation``, then all values about their mean by ``contrast``.

    x: (B, C, H, W). The others: (B,), one number per image. Grey is a pixel's mean over channels; the mean of ``contrast``
    runs over channels and positions. Saturation leaves one-channel images alone. Values may leave [-1, 1]; none is cut.
    """
    b, s, c = (t.view(-1, 1, 1, 1) for t in (brightness, saturation, contrast))
    x = x + b
    grey = x.mean(1, keepdim=True)
    x = grey + s * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + c * (x - mean)


def translated(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift each image by whole pixels and fill with 0: out[y, x] = in[y - down, x - right], or 0 outside.

    x: (B, C, H, W). down, right: (B,) whole numbers, of either sign.
    """
    for dim, shift in ((2, down), (3, right)):
        n = x.shape[dim]
        source = torch.arange(n, device=x.device) - shift.view(-1, 1)  # (B, n)
        view = (len(x), 1, n, 1) if dim == 2 else (len(x), 1, 1, n)
        inside = ((source >= 0) & (source < n)).view(view)
        x = x.gather(dim, source.clamp(0, n - 1).view(view).expand_as(x)) * inside
    return x


def cut_out(x: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Set a rectangle of each image to 0: rows top, ..., top + height - 1, as far as they are inside; columns alike.

    x: (B, C, H, W). top, left: (B,) whole numbers, which may be negative.
    """
    rows = torch.arange(x.shape[2], device=x.device) - top.view(-1, 1)
    columns = torch.arange(x.shape[3], device=x.device) - left.view(-1, 1)
    hole = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    return x * ~hole


def random_color(x: Tensor, generator: Draw = None) -> Tensor:
    """Colour with brightness in (-0.5, 0.5), saturation in (0, 2) and contrast in (0.5, 1.5), uniform, per image."""
    u = torch.rand(3, len(x), generator=generator, dtype=x.dtype, device=x.device)
    return colored(x, u[0] - 0.5, 2 * u[1], u[2] + 0.5)


def random_translation(x: Tensor, generator: Draw = None) -> Tensor:
    """Translate by up to 1/8 of the side, rounded to whole pixels, uniform in both directions, per image."""
    shifts = []
    for side in x.shape[2:]:
        most = int(side / 8 + 0.5)
        shifts.append(torch.randint(-most, most + 1, (len(x),), generator=generator, device=x.device))
    return translated(x, shifts[0], shifts[1])


def random_cutout(x: Tensor, generator: Draw = None) -> Tensor:
    """Cut out a square of half the side, its centre uniform over the image, so that it may hang over the border."""
    starts, (height, width) = [], [int(side / 2 + 0.5) for side in x.shape[2:]]
    for side, size in zip(x.shape[2:], (height, width), strict=True):
        # an even square is centred between pixels, so it has one place more
        centre = torch.randint(0, side + 1 - size % 2, (len(x),), generator=generator, device=x.device)
        starts.append(centre - size // 2)
    return cut_out(x, starts[0], starts[1], height, width)


AUGMENTATIONS: dict[str, Callable[[Tensor, Draw], Tensor]] = {
    "color": random_color,
    "translation": random_translation,
    "cutout": random_cutout,
}


def diff_augment(
    x: Tensor, policy: Sequence[str] = ("color", "translation", "cutout"), *, generator: torch.Generator | None = None
) -> Tensor:
    """T(x): the policy's augmentations in their order, each with random numbers of its own for every image.

    Section 3.2 of arXiv:2006.10738: D is shown T(x) and T(G(z)) only, in its own update and in G's, and T is
    differentiable, so that G learns through it and what is learnt is not "augmented images".

    x: (B, C, H, W), usually in [-1, 1], where the fill of 0 is grey. policy: names out of ``AUGMENTATIONS``; empty
    returns x itself. generator: source of the random numbers, default: torch's global one. The result has x's
    shape and dtype and a graph to x, twice differentiable. Raises ValueError for another shape or an unknown name.
    """
    if x.dim() != 4:
        raise ValueError(f"augmentation is for images (B, C, H, W), not for tensors of shape {tuple(x.shape)}")
    check(policy)
    for name in policy:
        x = AUGMENTATIONS[name](x, generator)
    return x


def check(policy: Sequence[str]) -> None:
    """ValueError for a name that is none of ``AUGMENTATIONS``."""
    for name in policy:
        if name not in AUGMENTATIONS:
            raise ValueError(f"there is no augmentation {name!r}: choose from {', '.join(AUGMENTATIONS)}")


@dataclass(eq=False)
class DiffAugment:
    """Show D nothing but randomly augmented images, real and generated, so that it cannot learn few images by heart."""

    formula: ClassVar[str] = "D(T(x)) against D(T(G(z))), in D's and in G's loss;  T: random, differentiable, per image"
    paper: ClassVar[str] = (
        "Zhao et al. 2020, Differentiable Augmentation for Data-Efficient GAN Training, arXiv:2006.10738, section 3.2"
    )

    policy: Annotated[tuple[str, ...], "which, in order: color, translation, cutout; a comma list"] = (
        "color",
        "translation",
        "cutout",
    )

    def __post_init__(self) -> None:
        if isinstance(self.policy, str):
            raise ValueError(f"policy is a list of names, not the text {self.policy!r}")
        check(self.policy)

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        """Augment the data tensor, the first, of both sides; codes and labels behind it stay as they are."""
        view = yield
        if view.real[0].dim() != 4:
            raise UsageError(
                f"diffaugment shifts and tints images, and these are data of shape {tuple(view.real[0].shape[1:])}: "
                "leave it out"
            )
        rng = gan.rng(self)
        real, fake = ((diff_augment(x, self.policy, generator=rng), *others) for x, *others in view)
        return View(real, fake)
