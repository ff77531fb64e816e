"""DCGAN on 28 px images in the manner of PyTorch's tutorial: nz x 1 x 1 latents, a sigmoid and BCELoss, batch norm."""

import gankit
import torch
from torch import nn

nz, ngf, ndf, batch_size = 32, 16, 16, 32


def images(n: int) -> torch.Tensor:
    """(n, 1, 28, 28) in [-1, 1]: a bright square on dark ground, anywhere; in place of your data."""
    corners = torch.randint(0, 20, (n, 2, 1))
    inside = (torch.arange(28) >= corners) & (torch.arange(28) < corners + 8)
    return 2 * (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].float() - 1


def weights_init(m: nn.Module) -> None:
    """Normal weights, as in the paper."""
    if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(m.weight, 0.0, 0.02)


def train(steps: int = 100) -> list[float]:
    """The loss of D, step by step."""
    torch.manual_seed(0)
    netG = nn.Sequential(
        nn.ConvTranspose2d(nz, ngf * 2, 7, bias=False),
        nn.BatchNorm2d(ngf * 2),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ngf),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    ).apply(weights_init)
    netD = nn.Sequential(
        nn.Conv2d(1, ndf, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ndf * 2),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(ndf * 2, 1, 7, bias=False),
        nn.Sigmoid(),
    ).apply(weights_init)
    criterion = nn.BCELoss()
    optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-4, betas=(0.5, 0.999))
    attached = gankit.attach(netG, netD, [("consistency", {"weight": 1}), "mode_seeking"], probabilities=True)
    data, losses = images(1000), []

    for step in range(1, steps + 1):
        # (1) Update D: maximize log(D(x)) + log(1 - D(G(z)))
        netD.zero_grad()
        real = data[torch.randint(len(data), (batch_size,))]
        label = torch.full((batch_size,), 1.0)
        errD_real = criterion(netD(real).view(-1), label)
        errD_real.backward()
        noise = torch.randn(batch_size, nz, 1, 1)
        fake = netG(noise)
        label.fill_(0.0)
        errD_fake = criterion(netD(fake.detach()).view(-1), label)
        errD_fake.backward()
        attached.d_terms(real, fake).backward()
        optimizerD.step()
        losses.append(errD_real.item() + errD_fake.item())

        # (2) Update G: maximize log(D(G(z)))
        optimizerG.zero_grad()
        label.fill_(1.0)
        errG = criterion(netD(fake).view(-1), label) + attached.g_terms(real, fake, noise)
        errG.backward()
        optimizerG.step()
        if step % 50 == 0:
            print(f"step {step}: D {losses[-1]:.3f}, G {errG.item():.3f}")
    return losses


if __name__ == "__main__":
    train()
