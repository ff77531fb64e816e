"""A loop of one's own with ``gankit.attach`` against the same terms by hand: CPU milliseconds per step, alternating.

    python tests/benchmarks/attached.py [--rounds 30] [--threads 1]

"terms alone" is ``d_loss + attached.d_terms(real, fake)``, and by hand a penalty that calls D itself; "logits shared" scores
what ``attached.show`` returned once, and by hand one forward pass serves loss and penalty.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import gankit
from gankit import networks

Term = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], None]
SIZES: dict[str, Any] = {"ring MLP": ((2,), 2, 256, 10), "DCGAN 28 px": ((1, 28, 28), 100, 64, 1)}


def squared_slope(logits: Tensor, x: Tensor) -> Tensor:
    """(B,) ||d logits_i / d x_i||^2."""
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return slope.flatten(1).square().sum(1)


def r1_alone(D: nn.Module, real: Tensor, fake: Tensor, real_logits: Tensor) -> Tensor:
    """R1 with a forward pass of its own."""
    x = real.detach().requires_grad_()
    return 5 * squared_slope(D(x), x).mean()


def r1_shared(D: nn.Module, real: Tensor, fake: Tensor, real_logits: Tensor) -> Tensor:
    """R1 from logits that are there."""
    return 5 * squared_slope(real_logits, real).mean()


def penalty(D: nn.Module, real: Tensor, fake: Tensor, real_logits: Tensor) -> Tensor:
    """WGAN-GP's penalty."""
    u = torch.rand(len(real), *(1,) * (real.dim() - 1))
    x = (u * real + (1 - u) * fake).detach().requires_grad_()
    return 10 * ((squared_slope(D(x), x) + 1e-12).sqrt() - 1).square().mean()


CASES: dict[str, tuple[list[str], bool, Term | None]] = {  # plugins, whether logits are shared, the term by hand
    "no plugin": ([], False, None),
    "r1, terms alone": (["r1"], False, r1_alone),
    "r1, logits shared": (["r1"], True, r1_shared),
    "gradient_penalty": (["gradient_penalty"], False, penalty),
}


def loop(size: str, plugins: list[str] | None, shared: bool, by_hand: Term | None) -> Step:
    """One step of D and one of G, with ``plugins`` attached, or (None) with a term by hand."""
    shape, z_dim, batch, _ = SIZES[size]
    torch.manual_seed(0)
    G, D = networks.generator(shape, z_dim), networks.discriminator([shape])
    D(torch.zeros(2, *shape))
    optimizers = {
        phase: torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True)
        for phase, m in (("d", D), ("g", G))
    }
    attached = None if plugins is None else gankit.attach(G, D, plugins, optimizers=optimizers)
    data = torch.rand(10_000, *shape) * 2 - 1

    def step() -> None:
        real = data[torch.randint(len(data), (batch,))]
        fake = G(torch.randn(batch, z_dim))
        shown = None
        if shared and attached is not None:
            shown = attached.show(real, fake)
            real_logits, fake_logits = D(*shown.real), D(*shown.fake)
        else:
            real_logits, fake_logits = D(real.requires_grad_() if shared else real), D(fake.detach())
        d_loss = softplus(-real_logits).mean() + softplus(fake_logits).mean()
        if shown is not None and attached is not None:
            d_loss = d_loss + attached.d_terms(shown, real_logits=real_logits, fake_logits=fake_logits)
        elif attached is not None:
            d_loss = d_loss + attached.d_terms(real, fake)
        elif by_hand is not None:
            d_loss = d_loss + by_hand(D, real, fake.detach(), real_logits)
        d_loss.backward()
        optimizers["d"].step()
        optimizers["d"].zero_grad()
        softplus(-D(fake)).mean().backward()
        optimizers["g"].step()
        for optimizer in optimizers.values():
            optimizer.zero_grad()

    return step


def compare(size: str, case: str, rounds: int) -> None:
    """Print both medians and the median of the rounds' ratios."""
    plugins, shared, by_hand = CASES[case]
    steps = SIZES[size][3]
    sides = {"attached": loop(size, plugins, shared, None), "by hand": loop(size, None, shared, by_hand)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 2):
        for name in sides if round_ % 2 else reversed(sides):
            started = time.process_time()
            for _ in range(steps):
                sides[name]()
            if round_ >= 2:  # the first rounds warm up
                times[name].append((time.process_time() - started) / steps)
    ours, theirs = (1000 * statistics.median(times[name]) for name in sides)
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    print(f"{size:<12} {case:<18} attached {ours:7.3f} ms   by hand {theirs:7.3f} ms   ratio {ratio:.3f}")


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in SIZES:
        for case in CASES:
            compare(size, case, options.rounds)


if __name__ == "__main__":
    main()
