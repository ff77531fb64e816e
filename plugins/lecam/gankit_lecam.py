"""LeCam regularization (Tseng et al. 2021, arXiv:2104.03310), as a function and as a gankit plugin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from gankit import hookimpl
from gankit.claims import Claims


def lecam_penalty(
    real_logits: Tensor,
    fake_logits: Tensor,
    real_average: Tensor | float,
    fake_average: Tensor | float,
    *,
    one_sided: bool = False,
) -> Tensor:
    """mean (D(x) - a_F)^2 + mean (D(G(z)) - a_R)^2: each side is drawn to where the *other* one has been.

    R_LC of arXiv:2104.03310 without its weight lambda. a_R and a_F are moving averages of the mean logit of the real and
    of the generated samples.

    real_logits, fake_logits: any shapes, such as (B,) or patches (B, 1, h, w); the mean is over everything.
    real_average, fake_average: a_R and a_F, numbers or 0-dim tensors; no gradient goes to them.
    one_sided: the official code's form, mean relu(D(x) - a_F)^2 + mean relu(a_R - D(G(z)))^2, which leaves a real logit
        below a_F and a fake one above a_R alone.

    Returns a 0-dim tensor with a graph to the critic's parameters, from logits that are already there: no forward pass.
    """
    above = real_logits - torch.as_tensor(fake_average, device=real_logits.device).detach()
    below = torch.as_tensor(real_average, device=fake_logits.device).detach() - fake_logits
    if one_sided:
        above, below = above.relu(), below.relu()
    return above.square().mean() + below.square().mean()


@dataclass(eq=False)
class LeCam:
    """Draw the logits of each side to the moving average of the other's, for training on little data (LeCam)."""

    formula: ClassVar[str] = (
        "weight * [mean (D(x) - a_F)^2 + mean (D(G(z)) - a_R)^2],  a: moving averages of the logits"
    )
    paper: ClassVar[str] = (
        "Tseng et al. 2021, Regularizing Generative Adversarial Networks under Limited Data, arXiv:2104.03310"
    )
    claims: ClassVar[Claims] = Claims(
        logits=lambda self, real, fake: (
            self.weight
            * sum(
                (gap.relu() if self.one_sided else gap).square().mean()
                for gap in (real - self.averages[1], self.averages[0] - fake)
            )
        ),
        per_sample=True,
        non_negative=True,
        deterministic=True,
        forwards=0,
        double_backwards=0,
    )

    weight: Annotated[float, "the paper's lambda; its code uses 0.3 for CIFAR-10"] = 0.3
    decay: Annotated[float, "of the averages, per update of D"] = 0.99
    start: Annotated[int, "first let so many steps pass; until then the averages are those of the last batch"] = 0
    one_sided: Annotated[bool, "the official code's form, which squares relu(D(x) - a_F) and relu(a_R - D(G(z)))"] = (
        False
    )
    # the averages a_R and a_F, (2,); None before the first update of D
    averages: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError("weight must not be negative, and finite")
        if not 0 <= self.decay < 1:
            raise ValueError("decay must be at least 0 and below 1")
        if self.start < 0:
            raise ValueError("start must not be negative")
        self._seen: list[Tensor] = []  # since the last update

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor, fake_logits: Tensor, step: int, ahead: bool) -> dict[str, Tensor] | None:
        """The term "lecam", from the averages of earlier updates; none in the first update, which has no averages."""
        if (
            not ahead and torch.is_grad_enabled()
        ):  # only remembered: the update may not be made, and may be of further batches
            self._seen.append(torch.stack([real_logits.detach().mean(), fake_logits.detach().mean()]))
        if self.averages is None or step <= self.start:
            return None
        return {
            "lecam": self.weight * lecam_penalty(real_logits, fake_logits, *self.averages, one_sided=self.one_sided)
        }

    @hookimpl
    def post_step(self, phase: str, step: int) -> None:
        """Move the averages by the logits of D's update, of all its batches: a <- decay a + (1 - decay) mean."""
        if phase != "d" or not self._seen:
            return
        # without the batches that overflowed, whose update a GradScaler skipped
        seen = torch.stack(self._seen)
        # autocast's logits are too coarse to move an average by a hundredth
        seen = seen.to(torch.promote_types(seen.dtype, torch.float32))
        mean = seen.masked_fill(~seen.isfinite(), math.nan).nanmean(0)
        self._seen = []
        if self.averages is None or step <= self.start:
            self.averages = mean
        else:
            averages = self.averages.to(mean)
            self.averages = torch.lerp(torch.where(mean.isnan(), averages, mean), averages, self.decay)

    def state_dict(self) -> dict[str, Any]:
        """The averages, once there are some."""
        return {} if self.averages is None else {"averages": self.averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.averages = state.get("averages")
