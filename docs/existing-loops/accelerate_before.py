"""A GAN on 28 px images with Accelerate."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader


def images(n: int) -> torch.Tensor:
    """(n, 1, 28, 28) in [-1, 1]: a bright square on dark ground, anywhere; in place of your data."""
    corners = torch.randint(0, 20, (n, 2, 1))
    inside = (torch.arange(28) >= corners) & (torch.arange(28) < corners + 8)
    return 2 * (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].float() - 1


def train(steps: int = 100, mixed_precision: str = "no") -> list[float]:
    """The loss of D, step by step."""
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    set_seed(0)
    G = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
    D = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    d_optimizer = torch.optim.Adam(D.parameters(), lr=2e-4, betas=(0.5, 0.999))
    g_optimizer = torch.optim.Adam(G.parameters(), lr=2e-4, betas=(0.5, 0.999))
    loader = DataLoader(images(32 * steps), batch_size=32)
    G, D, g_optimizer, d_optimizer, loader = accelerator.prepare(G, D, g_optimizer, d_optimizer, loader)
    losses = []

    for real in loader:
        fake = G(torch.randn(len(real), 32, device=accelerator.device))
        d_loss = softplus(-D(real)).mean() + softplus(D(fake.detach())).mean()
        d_optimizer.zero_grad()
        accelerator.backward(d_loss)
        d_optimizer.step()
        losses.append(d_loss.item())

        g_loss = softplus(-D(fake)).mean()
        g_optimizer.zero_grad()
        accelerator.backward(g_loss)
        g_optimizer.step()
    return losses


if __name__ == "__main__":
    print(f"D at last {train()[-1]:.3f}")
