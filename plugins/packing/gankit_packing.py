"""Packing of PacGAN (Lin et al. 2018, arXiv:1712.04086), as functions and as a gankit plugin."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from torch import Tensor

from gankit import UsageError, View, hookimpl

if TYPE_CHECKING:
    from gankit import GAN


def pack(tensor: Tensor, m: int = 2) -> Tensor:
    """Join every ``m`` neighbouring samples along dimension 1: (B, C, ...) -> (B/m, mC, ...), (B,) -> (B/m, m).

    Pack j holds the samples jm, ..., jm + m - 1, each with its own channels in order, so the packs of a shuffled batch
    are independent draws of m samples (section 2 of arXiv:1712.04086). Any dtype; the values keep their graph.

    tensor: (B, C, \\*rest), vectors (B, D), or one number per sample (B,), such as labels. Raises ValueError if m is
    below 1 or does not divide B. :func:`unpack` undoes it.
    """
    if m < 1 or len(tensor) % m:
        raise ValueError(f"packs of {m} need a multiple of {m} samples, not {len(tensor)}")
    channels, *rest = tensor.shape[1:] or (1,)
    return tensor.reshape(len(tensor) // m, m * channels, *rest)


def unpack(packed: Tensor, m: int = 2) -> Tensor:
    """Take packs of ``m`` apart along dimension 1, (B/m, mC, ...) -> (B, C, ...): the inverse of :func:`pack`.

    One number per sample comes back as (B, 1). Raises ValueError if m is below 1 or does not divide the size of
    dimension 1.
    """
    if packed.dim() < 2 or m < 1 or packed.shape[1] % m:
        raise ValueError(f"a tensor of shape {tuple(packed.shape)} cannot hold packs of {m}")
    return packed.reshape(m * len(packed), packed.shape[1] // m, *packed.shape[2:])


@dataclass(eq=False)
class Packing:
    """Show the discriminator packs of ``m`` samples of one side at once, so that it sees when they lack variety."""

    formula: ClassVar[str] = "D(x_1, ..., x_m) against D(G(z_1), ..., G(z_m)), joined along channels or features"
    paper: ClassVar[str] = "Lin et al. 2018, PacGAN: The power of two samples, arXiv:1712.04086, section 2"

    m: Annotated[int, "samples per pack; the paper uses 2 to 4, 1 is no packing"] = 2

    def __post_init__(self) -> None:
        if self.m < 1:
            raise ValueError("m must be at least 1")

    @hookimpl(wrapper=True, tryfirst=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        """Pack every tensor of both sides, x, latents and labels alike; outermost, so it packs what others show.

        Called for the first time while the discriminator is built, which is when a batch that does not divide by m is
        refused.
        """
        view = yield
        samples, processes = len(view.real[0]), gan.team.size
        if samples % self.m:
            fitting = -(-samples // self.m) * self.m * processes
            share = f"each process's share, {samples} of " if processes > 1 else ""
            raise UsageError(
                f"packing joins {self.m} samples at a time, which does not divide "
                f"{share}the batch of {samples * processes}: "
                f"set the batch size to {fitting}; where only a data loader's last batch is short, drop it (drop_last=True)"
            )
        real, fake = (tuple(pack(t, self.m) for t in side) for side in view)
        return View(real, fake)
