"""Deliberately broken plugins: each a slip that a smoke test lets pass, and each caught by one check, ``caught_by``.

``data``: the kinds of data it takes to see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, ClassVar

from torch import Tensor

from gankit.plugins import snake_case

THEMES = ("declared", "effects", "state", "gradients", "views", "surroundings", "claimed", "no_cuda")


@dataclass(eq=False)
class Plugin:
    """What is right about all of them."""

    formula: ClassVar[str] = "weight * mean"
    paper: ClassVar[str] = "none"
    caught_by: ClassVar[str] = ""
    data: ClassVar[tuple[str, ...]] = ("vector",)

    weight: Annotated[float, "weight of the term"] = 1.0

    def term(self, value: Tensor) -> dict[str, Tensor]:
        """The value, weighted, under the plugin's name."""
        return {snake_case(type(self).__name__): self.weight * value}


def all_broken() -> list[type[Plugin]]:
    """All of them."""
    modules = [import_module(f"broken.{theme}") for theme in THEMES]
    return [c for m in modules for c in vars(m).values() if isinstance(c, type) and vars(c).get("caught_by")]
