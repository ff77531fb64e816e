"""Helpers for tests of plugins: tiny GANs, and a few steps of the real loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gankit import losses
from gankit.gan import GAN, Latent, derive_seed
from gankit.hookspecs import hookimpl
from gankit.loop import train

SHAPES = {"vector": (3,), "image": (1, 28, 28)}


def tiny_gan(
    kind: str = "vector",
    plugins: Mapping[str, object] | None = None,
    core: Mapping[str, object] | None = None,
    *,
    loss: str = "non_saturating",
    batch_size: int = 8,
    z_dim: int = 4,
    seed: int = 0,
    **settings: Any,
) -> GAN:
    """A built GAN with small networks on random data: ``kind`` is "vector" (B, 3) or "image" (B, 1, 28, 28).

    plugins: objects by name. core: further hook implementations, which act after the plugins. settings: any other field
    of :class:`gankit.GAN`.
    """
    shape = SHAPES[kind]

    gan = GAN(
        **{"generator": None, "discriminator": None, "architecture": {"width": 8}, **settings},
        shape=shape,
        latent=Latent(z_dim),
        loss=losses.make(loss),
        plugins=plugins or {},
        core=core or {},
        batch_size=batch_size,
        seed=seed,
    )
    stream = torch.Generator().manual_seed(derive_seed(seed, "data"))
    gan.next_real = lambda: torch.rand(batch_size, *shape, generator=stream) * 2 - 1
    return gan.build()


@dataclass(eq=False)
class Log:
    """Records every update: (phase, step, {term: value})."""

    updates: list[tuple[str, int, dict[str, float]]] = field(default_factory=list)

    @hookimpl
    def post_step(self, terms: dict[str, Tensor], phase: str, step: int) -> None:
        """Keep the terms as numbers."""
        self.updates.append((phase, step, {name: term.item() for name, term in terms.items()}))


def run(plugins: Mapping[str, object], *, kind: str = "vector", steps: int = 3, **settings: Any) -> tuple[GAN, Log]:
    """Train a tiny GAN for a few steps with these plugins; the GAN and the terms of every update."""
    log = Log()
    gan = tiny_gan(kind, plugins, {"log": log}, **settings)
    train(gan, steps)
    return gan, log
