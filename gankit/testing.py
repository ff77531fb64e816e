"""Helpers for tests of plugins: tiny GANs, and a few steps of the real loop."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gankit import losses
from gankit.gan import GAN, Latent, derive_seed
from gankit.hookspecs import hookimpl
from gankit.loop import train

if TYPE_CHECKING:
    from gankit.conformance import Check

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
    shape: tuple[int, ...] | None = None,
    **settings: Any,
) -> GAN:
    """A built GAN with small networks on random data of ``shape``, or by ``kind``: "vector" (3,) or "image" (1, 28, 28).

    plugins: objects by name. core: further hook implementations, which act after the plugins. settings: any other field
    of :class:`gankit.GAN`.
    """
    shape = shape or SHAPES[kind]

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


def write_digits(folder: Path, train: int = 2000, test: int = 500) -> Path:
    """Write MNIST's four files with digits drawn in one type, of several sizes and places, with noise; give the folder.

    What a test needs to read, to train a classifier on and to stack, where the true files are not at hand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, n, seed in (("train", train, 0), ("t10k", test, 1)):
        random = np.random.default_rng(seed)
        labels = random.integers(0, 10, n, dtype=np.uint8)
        images = np.stack([_drawn(str(label), random) for label in labels])
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes(), 1))
    return folder


def _drawn(digit: str, random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image = Image.new("L", (28, 28))
    place = (14.0 + random.integers(-2, 3), 14.0 + random.integers(-2, 3))
    font = ImageFont.load_default(int(random.integers(18, 25)))
    ImageDraw.Draw(image).text(place, digit, fill=255, font=font, anchor="mm")
    noisy = np.asarray(image) + random.normal(0, 20, (28, 28))
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = noisy.clip(0, 255).astype(np.uint8)
    return pixels


def plugin_checks(target: str | type, **options: Any) -> list[Check]:
    """The checks of ``gankit check`` as pytest parameters, each named and called without arguments.

    target: an installed name, ``file.py:Class`` or the class itself. options: of the plugin, in all checks.

        @pytest.mark.parametrize("check", plugin_checks(R1), ids=str)
        def test_conformance(check):
            check()
    """
    from gankit.conformance import checks_of

    return checks_of(target, options)
