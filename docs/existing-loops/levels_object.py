"""A GAN on 28 px images, in a loop of one's own."""

import torch
from gankit_lecam import LeCam
from torch import nn
from torch.nn.functional import softplus


def images(n: int) -> torch.Tensor:
    """(n, 1, 28, 28) in [-1, 1]: a bright square on dark ground, anywhere; in place of your data."""
    corners = torch.randint(0, 20, (n, 2, 1))
    inside = (torch.arange(28) >= corners) & (torch.arange(28) < corners + 8)
    return 2 * (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].float() - 1


def train(steps: int = 200) -> list[float]:
    """The loss of D, step by step."""
    torch.manual_seed(0)
    G = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))
    D = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    d_optimizer = torch.optim.Adam(D.parameters(), lr=2e-4, betas=(0.5, 0.999))
    g_optimizer = torch.optim.Adam(G.parameters(), lr=2e-4, betas=(0.5, 0.999))
    lecam = LeCam(weight=0.1)
    data, losses = images(1000), []

    for step in range(1, steps + 1):
        real = data[torch.randint(len(data), (32,))]
        fake = G(torch.randn(32, 32))
        real_logits, fake_logits = D(real), D(fake.detach())
        d_loss = softplus(-real_logits).mean() + softplus(fake_logits).mean()
        d_loss = d_loss + sum((lecam.pre_d_loss(real_logits, fake_logits, step, ahead=False) or {}).values())
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        lecam.post_step("d", step)
        losses.append(d_loss.item())

        g_loss = softplus(-D(fake)).mean()
        g_optimizer.zero_grad()
        g_loss.backward()
        g_optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: D {d_loss.item():.3f}, G {g_loss.item():.3f}")
    return losses


if __name__ == "__main__":
    train()
