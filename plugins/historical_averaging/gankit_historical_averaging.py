"""Historical averaging (Salimans et al. 2016, arXiv:1606.03498, section 3.3), as functions and as a gankit plugin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from gankit import hookimpl

if TYPE_CHECKING:
    from gankit import GAN


def historical_averaging(parameters: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    """|| theta - (1/t) sum_{i=1}^t theta[i] ||_2^2, summed over all entries of all parameters, the mean held fixed.

    Section 3.3 of arXiv:1606.03498. parameters: theta, a player's tensors of any shapes. means: their running means over
    past updates, pairwise of equal shape (see :func:`running_means`).

    Returns a 0-dim tensor with a graph to the parameters; its gradient is 2 (theta - mean). No critic forward. Raises
    ValueError if the lists or shapes do not match, or are empty.
    """
    shapes = [tuple(p.shape) for p in parameters], [tuple(m.shape) for m in means]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(f"parameters and means must have the same shapes, not {shapes[0]} and {shapes[1]}")
    squares = [mse_loss(p, m.detach(), reduction="sum") for p, m in zip(parameters, means, strict=True)]
    return torch.stack(squares).sum()


@torch.no_grad()
def running_means(means: Sequence[Tensor], parameters: Sequence[Tensor], t: int) -> list[Tensor]:
    """The means over t values from the means over t - 1 and the t-th value: mean + (theta - mean) / t.

    t counts from 1, where ``means`` is not looked at. Returns new tensors without a graph.
    """
    if t == 1:
        return [p.detach().clone() for p in parameters]
    return list(torch._foreach_lerp(list(means), list(parameters), 1 / t))


@dataclass(eq=False)
class HistoricalAveraging:
    """Pull each player's weights to the mean of all their past values, to calm games that circle their equilibrium.

    theta[i] are the values after a player's i-th update, and the term of update t + 1 looks at the mean over i = 1..t. The
    first update so has no term, and the second one's is 0. A phase's players (G and an encoder) share a term. If the shape
    of a parameter changes on the way (a growing network), the phase's average starts anew.
    """

    formula: ClassVar[str] = "weight * || theta - (1/t) sum_{i=1}^t theta[i] ||_2^2  in each player's loss"
    paper: ClassVar[str] = "Salimans et al. 2016, Improved Techniques for Training GANs, arXiv:1606.03498, section 3.3"

    weight_d: Annotated[float, "weight in D's loss; the paper has none, that is 1; 0 leaves it out"] = 1.0
    weight_g: Annotated[float, "weight in G's loss, which holds the encoder's weights, too"] = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.weight_d < math.inf and 0 <= self.weight_g < math.inf):
            raise ValueError("weight_d and weight_g must not be negative, infinite or NaN")
        self.weights = {"d": self.weight_d, "g": self.weight_g}
        self.means: dict[str, list[Tensor]] = {"d": [], "g": []}
        self.counts = {"d": 0, "g": 0}

    @hookimpl
    def pre_d_loss(self, gan: GAN) -> dict[str, Tensor] | None:
        """D's term "historical_averaging"."""
        return self.term(gan, "d")

    @hookimpl
    def post_g_loss(self, gan: GAN) -> dict[str, Tensor] | None:
        """G's term "historical_averaging"."""
        return self.term(gan, "g")

    def term(self, gan: GAN, phase: str) -> dict[str, Tensor] | None:
        """The term of one phase, or None before its first update and with weight 0."""
        means = self.history(gan, phase) if self.weights[phase] else []
        if not means:
            return None
        return {"historical_averaging": self.weights[phase] * historical_averaging(gan.parameters(phase), means)}

    def history(self, gan: GAN, phase: str) -> list[Tensor]:
        """The phase's means, beside its parameters; none before the first update and after a change of shape."""
        means, parameters = self.means[phase], gan.parameters(phase)
        if [m.shape for m in means] != [p.shape for p in parameters]:
            return []
        return [m.to(p.device) for m, p in zip(means, parameters, strict=True)]

    @hookimpl
    def post_step(self, gan: GAN, phase: str) -> None:
        """Take the values after this update into the mean of their player."""
        if not self.weights[phase]:
            return
        means = self.history(gan, phase)
        self.counts[phase] = self.counts[phase] + 1 if means else 1
        self.means[phase] = running_means(means, gan.parameters(phase), self.counts[phase])

    def state_dict(self) -> dict[str, Any]:
        """Means and number of updates, by phase."""
        return {"means": {phase: list(means) for phase, means in self.means.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.means = {phase: list(means) for phase, means in state["means"].items()}
        self.counts = dict(state["counts"])
