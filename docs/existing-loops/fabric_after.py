"""A GAN on 28 px images with Lightning Fabric."""

import gankit
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader


def images(n: int) -> torch.Tensor:
    """(n, 1, 28, 28) in [-1, 1]: a bright square on dark ground, anywhere; in place of your data."""
    corners = torch.randint(0, 20, (n, 2, 1))
    inside = (torch.arange(28) >= corners) & (torch.arange(28) < corners + 8)
    return 2 * (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].float() - 1


def train(steps: int = 100, precision: str = "32-true") -> list[float]:
    """The loss of D, step by step."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.seed_everything(0, verbose=False)
    G = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
    D = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    D, d_optimizer = fabric.setup(D, torch.optim.Adam(D.parameters(), lr=2e-4, betas=(0.5, 0.999)))
    G, g_optimizer = fabric.setup(G, torch.optim.Adam(G.parameters(), lr=2e-4, betas=(0.5, 0.999)))
    loader = fabric.setup_dataloaders(DataLoader(images(32 * steps), batch_size=32))
    optimizers = {"d": d_optimizer, "g": g_optimizer}
    attached = gankit.attach(G, D, [("r1", {"weight": 0.1}), "lecam"], optimizers=optimizers)
    losses = []

    for real in loader:
        fake = G(torch.randn(len(real), 32, device=fabric.device))
        d_loss = softplus(-D(real)).mean() + softplus(D(fake.detach())).mean()
        d_loss = d_loss + attached.d_terms(real, fake)
        d_optimizer.zero_grad()
        fabric.backward(d_loss)
        d_optimizer.step()
        losses.append(d_loss.item())

        g_loss = softplus(-D(fake)).mean()
        g_optimizer.zero_grad()
        fabric.backward(g_loss)
        g_optimizer.step()
    return losses


if __name__ == "__main__":
    print(f"D at last {train()[-1]:.3f}")
