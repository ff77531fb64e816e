"""One thread or all: milliseconds per step against the work of one forward pass, alternating in one process.

    python tests/benchmarks/threads.py

The multiply-adds at which the ratio falls below 1 are ``gankit.run.WORTH_THREADS``.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from gankit import GAN, Latent, networks, train


def build(shape: tuple[int, ...], width: int, batch: int) -> GAN:
    gan = GAN(
        generator=lambda shape, z_dim: networks.generator(shape, z_dim, width=width),
        discriminator=lambda shapes: networks.discriminator(shapes, width=width),
        shape=shape,
        latent=Latent(32),
        batch_size=batch,
    )
    data = torch.rand(batch, *shape) * 2 - 1
    gan.next_real = lambda: data
    return gan.build()


def main() -> None:
    every = torch.get_num_threads()
    cases = [((2,), width, batch) for width in (64, 128, 256, 512, 1024) for batch in (64, 256)]
    cases += [((1, 28, 28), width, 64) for width in (4, 8, 16, 32)]
    print(f"{'shape':<14}{'width':>6}{'batch':>6}{'Mmadd':>9}{'1 thread':>10}{f'{every} threads':>11}{'ratio':>8}")
    for shape, width, batch in cases:
        gan = build(shape, width, batch)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            gan.discriminator(*gan.first_view().real)
        train(gan, gan.step + 3)
        times: dict[int, list[float]] = {1: [], every: []}
        for _ in range(10):
            for threads, seen in times.items():
                torch.set_num_threads(threads)
                train(gan, gan.step + 1)
                started = time.perf_counter()
                train(gan, gan.step + 4)
                seen.append((time.perf_counter() - started) / 4)
        one, all_ = (1000 * statistics.median(times[threads]) for threads in (1, every))
        work = counter.get_total_flops() / 2e6
        print(f"{shape!s:<14}{width:>6}{batch:>6}{work:>9.1f}{one:>10.2f}{all_:>11.2f}{all_ / one:>8.2f}")


if __name__ == "__main__":
    main()
