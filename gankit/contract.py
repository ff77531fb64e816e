"""What travels through the hooks, and the checks at the boundary.

Each check takes what a plugin returned and raises ``UsageError`` or ``TypeError`` with one sentence; ``plugins.guard``
adds whose fault it is. Only values of plugins are checked, never the core's own, so a run without plugins pays nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PHASES = ("d", "g")


class Batch(NamedTuple):
    """One update's raw samples: real and fake (B, \\*shape), z (B, z_dim), and what plugins add by name."""

    real: Tensor
    fake: Tensor
    z: Tensor
    extra: Mapping[str, Tensor] = {}


class View(NamedTuple):
    """What the critic is shown: its positional arguments for the real and for the fake side."""

    real: tuple[Tensor, ...]
    fake: tuple[Tensor, ...]


@dataclass
class Player:
    """A network that is trained: in phase "d" with the discriminator or in phase "g" with the generator.

    ``module`` may be a factory, as for ``GAN``, until the GAN is built; then it is the module.
    """

    module: Any
    phase: str

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f'a player\'s phase is "d" or "g", not {self.phase!r}')


def watched(view: View) -> View:
    """The view with every floating tensor requiring a gradient, so that penalties can differentiate with respect to it.

    Tensors that carry a graph stay as they are; the others become leaves that share their memory.
    """
    real, fake = (
        tuple(t if t.requires_grad or not t.is_floating_point() else t.detach().requires_grad_() for t in side)
        for side in view
    )
    return View(real, fake)


def _players(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(player, Player) for player in value.values()):
        raise TypeError(f"must return a dict of name to Player, not {_describe(value)}")


def _setup(value: Any) -> None:
    if value is not None:
        raise TypeError(f"must return nothing, not {_describe(value)}")


def _batch(value: Any) -> None:
    if not isinstance(value, Batch) or not all(isinstance(t, Tensor) for t in value[:3]):
        raise TypeError(f"must return a Batch of tensors, not {_describe(value)}")
    if value.real.shape != value.fake.shape or len(value.z) != len(value.real):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(Batch._fields, value[:3], strict=False))
        raise ValueError(
            f"must return a Batch whose real and fake have one shape and whose z has one row each: {shapes}"
        )


def _view(value: Any) -> None:
    if not isinstance(value, View) or not all(
        isinstance(side, tuple) and side and all(isinstance(t, Tensor) for t in side) for side in value
    ):
        raise TypeError(f"must return a View of two tuples of tensors, not {_describe(value)}")
    real, fake = ([tuple(t.shape) for t in side] for side in value)
    if real != fake or len({shape[:1] for shape in real}) > 1:
        raise ValueError(
            f"must return a View whose sides have equal shapes and one batch size: real {real}, fake {fake}"
        )


def _critic(value: Any) -> None:
    if not callable(value):
        raise TypeError(f"must return a callable from the view's tensors to logits, not {_describe(value)}")


def _terms(value: Any) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"must return a dict of named terms or None, not {_describe(value)}")
    for name, term in value.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"must name its terms with non-empty strings, not {name!r}")
        if not isinstance(term, Tensor) or term.dim() or not term.is_floating_point():
            raise TypeError(f"must return 0-dim floating tensors; term {name!r} is {_describe(term)}")
        if torch.is_grad_enabled() and not term.requires_grad:
            raise ValueError(f"returned the term {name!r} cut off from every parameter: it would train nothing")


def _metrics(value: Any) -> None:
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(number, (int, float)) for name, number in value.items()
    ):
        raise TypeError(f"must return a dict of name to number or None, not {_describe(value)}")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_describe(v)}" for k, v in value.items()) + "}"
    return f"{value!r:.80} ({type(value).__name__})"


CHECKS: dict[str, Callable[[Any], None]] = {
    "players": _players,
    "setup": _setup,
    "sample": _batch,
    "view": _view,
    "critic": _critic,
    "pre_d_loss": _terms,
    "post_g_loss": _terms,
    "post_step": _setup,
    "evaluate": _metrics,
}
