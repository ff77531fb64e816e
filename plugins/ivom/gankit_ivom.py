"""IvOM and the error of G(E(x)) with every evaluation, as a gankit plugin; the mathematics is in gankit.inversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from gankit import UsageError, hookimpl
from gankit.inversion import RESTARTS, STEPS, measured

if TYPE_CHECKING:
    from gankit import GAN


@dataclass(eq=False)
class Ivom:
    """Measure how near G can come to held-out samples, and where there is an encoder E how near G(E(x)) is to x.

    A real sample of a mode that G has lost keeps a residual, so this tells of lost modes in data whose modes nobody knows.
    The columns are those of ``gankit invert`` with the same numbers.
    """

    formula: ClassVar[str] = "mean_x min_z mean_f (G(z) - x)_f^2;  with an encoder also mean_x mean_f (G(E(x)) - x)_f^2"
    paper: ClassVar[str] = "Unrolled GANs, arXiv:1611.02163, section 3.4; VEEGAN, arXiv:1705.07761, section 4"

    n: Annotated[int, "held-out samples"] = 64
    steps: Annotated[int, "of Adam from each start"] = STEPS
    restarts: Annotated[int, "starts; the best of all points met counts"] = RESTARTS

    def __post_init__(self) -> None:
        if min(self.n, self.steps, self.restarts) < 1:
            raise ValueError("n, steps and restarts must be at least 1")

    @hookimpl
    def evaluate(self, gan: GAN, step: int | None) -> dict[str, float] | None:
        """``ivom@...`` and ``reconstruction_error@...``, in the data's own scale; nothing for true data, which need no G."""
        if step is None:
            return None
        if gan.data is None:
            raise UsageError("ivom looks for held-out samples: set gan.data to a gankit.data.Dataset")
        x = gan.data.held_out(self.n).to(gan.device)
        found = measured(gan, x, gan.data.name, steps=self.steps, restarts=self.restarts)
        gan.provenance |= found.provenance
        return found.metrics
