"""A GAN loop as one would write it by hand: the yardstick for gankit's own, in results and in time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class Loop:
    """Non-saturating GAN, one D and one G update per step, each on fresh samples."""

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        next_real: Callable[[], Tensor],
        next_z: Callable[[], Tensor],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.5, 0.999),
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.next_real, self.next_z = next_real, next_z
        self.g_parameters = list(generator.parameters())
        self.g_optimizer = torch.optim.Adam(self.g_parameters, lr=lr, betas=betas, fused=True)
        self.d_optimizer = torch.optim.Adam(discriminator.parameters(), lr=lr, betas=betas, fused=True)

    def train(self, steps: int) -> None:
        generator, discriminator = self.generator, self.discriminator
        for _ in range(steps):
            real = self.next_real()
            with torch.no_grad():
                fake = generator(self.next_z())
            d_loss = softplus(-discriminator(real)).mean() + softplus(discriminator(fake)).mean()
            d_loss.backward()
            self.d_optimizer.step()
            self.d_optimizer.zero_grad()

            self.next_real()  # gankit hands a batch to the G update, too: draw it, to stay on the same samples
            g_loss = softplus(-discriminator(generator(self.next_z()))).mean()
            g_loss.backward(inputs=self.g_parameters)
            self.g_optimizer.step()
            self.g_optimizer.zero_grad()
