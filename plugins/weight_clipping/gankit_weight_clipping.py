"""Weight clipping of WGAN (Arjovsky et al. 2017, arXiv:1701.07875, algorithm 1), as a function and as a gankit plugin."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from torch import Tensor

from gankit import hookimpl
from gankit.checks import reparametrized

if TYPE_CHECKING:
    from gankit import GAN


@torch.no_grad()
def clip_weights(parameters: Iterable[Tensor], c: float = 0.01) -> None:
    """Clamp every number of every tensor to [-c, c], in place: line 7 of algorithm 1, w <- clip(w, -c, c).

    parameters: the critic's, ``critic.parameters()``, after each of its updates; not its buffers (the running statistics
        of a batch norm are no weights). c: the bound, positive. No forward and no backward pass. Raises ValueError if c
        is not positive.
    """
    if not c > 0:
        raise ValueError("c must be positive")
    for parameter in parameters:
        parameter.clamp_(-c, c)


@dataclass(eq=False)
class WeightClipping:
    """Clamp the critic's trained parameters to [-c, c] after each of its updates (WGAN)."""

    formula: ClassVar[str] = "after each update of D:  w <- clip(w, -c, c) for every trained parameter w"
    paper: ClassVar[str] = "Arjovsky et al. 2017, Wasserstein GAN, arXiv:1701.07875, algorithm 1"

    c: Annotated[float, "bound of every trained parameter of the discriminator, biases included"] = 0.01

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError("c must be positive")

    @hookimpl(trylast=True)
    def setup(self, gan: GAN) -> None:
        """Refuse weights that are computed from stored ones: clipping those is not clipping the weight that acts."""
        for name, player in gan.players.items():
            found = reparametrized(player.module) if player.phase == "d" else []
            if found:
                gan.refuse(
                    "clipped-parametrization",
                    f"weight_clipping clips stored weights, but the {name} computes its weight at {found[0]!r} from them "
                    "(spectral norm, weight norm or the like), so the weight that acts is not clipped: use one of the two",
                )

    @hookimpl
    def post_step(self, gan: GAN, phase: str) -> None:
        """After each of the ``d_steps`` updates of a step; the initial weights are not clipped, as in the paper."""
        if phase == "d":
            # gankit.attach lists the frozen ones, too
            clip_weights((p for p in gan.parameters("d") if p.requires_grad), self.c)
