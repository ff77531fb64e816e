"""What a regularizer promises about itself, for ``gankit check`` to hold it to. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Promises of a plugin, as its class variable ``claims``; whatever is left out is not promised and not checked.

    per_sample: every term is a mean over the samples of what depends on that sample alone, and every sample has random
        draws of its own; for a view, each sample is treated by itself, with its own draws.
    non_negative: no term is ever below 0.
    deterministic: draws no random numbers.
    stateless: remembers nothing from one update to the next.
    gradient_norm: the D term as a function of the norm of the critic's gradient, (plugin, norms (B,)) -> (B,), weight
        included: the term is the mean of it. ``lambda self, norm: self.weight * (norm - 1) ** 2``.
    at: where that gradient is taken: at the real or the generated samples, between a real and a generated sample, or
        near the real ones.
    logits: the D term as a function of the logits alone, (plugin, real_logits, fake_logits) -> 0-dim.
    slopes: the D term as a function of the logits and of the norms of the critic's gradient at the samples of both sides,
        (plugin, real_logits, real_norms, fake_logits, fake_norms), each (B,), -> 0-dim.
    forwards: calls of the critic that the D term adds to an update.
    double_backwards: gradients that are taken in order to be differentiated once more in an update of D.
    waives: checks that it does not hold to on purpose, each with the reason, which ``gankit check`` prints.

    The functions are given the ``step`` and the ``steps`` of the whole run, too, where they have arguments of these names,
    for weights that change.
    """

    per_sample: bool = False
    non_negative: bool = False
    deterministic: bool = False
    stateless: bool = False
    gradient_norm: Callable[..., Tensor] | None = None
    at: Literal["real", "fake", "between", "near_real"] | None = None
    logits: Callable[..., Tensor] | None = None
    slopes: Callable[..., Tensor] | None = None
    forwards: int | None = None
    double_backwards: int | None = None
    waives: Mapping[str, str] = field(default_factory=dict)
