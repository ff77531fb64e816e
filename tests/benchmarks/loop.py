"""gankit's loop against a hand-written one: milliseconds per step, alternating in one process.

    python tests/benchmarks/loop.py [--rounds 40]

Prints medians and their ratio for the ring MLP and for DCGAN on 28 px images, on one thread and on all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import handwritten

from gankit import GAN, Latent, networks, train


def build(shape: tuple[int, ...], z_dim: int, batch: int) -> GAN:
    gan = GAN(
        generator=lambda shape, z_dim: networks.generator(shape, z_dim),
        discriminator=lambda shapes: networks.discriminator(shapes),
        shape=shape,
        latent=Latent(z_dim),
        batch_size=batch,
    )
    data = torch.rand(10_000, *shape) * 2 - 1
    stream = torch.Generator().manual_seed(0)
    gan.next_real = lambda: data[torch.randint(len(data), (batch,), generator=stream)]
    return gan.build()


def compare(name: str, shape: tuple[int, ...], z_dim: int, batch: int, steps: int, rounds: int) -> None:
    ours = build(shape, z_dim, batch)
    theirs = build(shape, z_dim, batch)
    times: dict[str, list[float]] = {"gankit": [], "by hand": []}

    def step_gankit() -> None:
        train(ours, ours.step + steps)

    loop = handwritten.Loop(theirs.generator, theirs.discriminator, theirs.next_real, theirs.next_z)

    def step_by_hand() -> None:
        loop.train(steps)

    pairs = [("gankit", step_gankit), ("by hand", step_by_hand)]
    for round_ in range(rounds + 2):
        for side, act in pairs if round_ % 2 else pairs[::-1]:
            started = time.perf_counter()
            act()
            if round_ >= 2:  # the first rounds warm up
                times[side].append((time.perf_counter() - started) / steps)
    gankit, by_hand = (1000 * statistics.median(times[side]) for side in ("gankit", "by hand"))
    ratio = statistics.median(a / b for a, b in zip(times["gankit"], times["by hand"], strict=True))
    print(f"{name:<28} gankit {gankit:7.3f} ms   by hand {by_hand:7.3f} ms   ratio {ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    every = torch.get_num_threads()
    for threads in sorted({1, every}):
        torch.set_num_threads(threads)
        compare(f"ring MLP, {threads} thread(s)", (2,), 2, 256, 50, rounds)
        compare(f"DCGAN 28 px, {threads} thread(s)", (1, 28, 28), 100, 64, 2, rounds)


if __name__ == "__main__":
    main()
