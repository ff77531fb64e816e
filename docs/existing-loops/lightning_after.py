"""A GAN on 28 px images with Lightning's manual optimisation."""

import gankit
import lightning as L
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader


def images(n: int) -> torch.Tensor:
    """(n, 1, 28, 28) in [-1, 1]: a bright square on dark ground, anywhere; in place of your data."""
    corners = torch.randint(0, 20, (n, 2, 1))
    inside = (torch.arange(28) >= corners) & (torch.arange(28) < corners + 8)
    return 2 * (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].float() - 1


class GAN(L.LightningModule):
    """G and D, each with an optimiser of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28))
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
        )  # fmt: skip
        self.losses: list[float] = []

    def training_step(self, real: torch.Tensor, batch_idx: int) -> None:
        """One update of each."""
        d_optimizer, g_optimizer = self.optimizers()
        fake = self.generator(torch.randn(len(real), 32, device=self.device))

        self.toggle_optimizer(d_optimizer)
        d_loss = softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(fake.detach())).mean()
        d_loss = d_loss + self.attached.d_terms(real, fake)
        d_optimizer.zero_grad()
        self.manual_backward(d_loss)
        d_optimizer.step()
        self.untoggle_optimizer(d_optimizer)
        self.losses.append(d_loss.item())

        self.toggle_optimizer(g_optimizer)
        g_loss = softplus(-self.discriminator(fake)).mean()
        g_optimizer.zero_grad()
        self.manual_backward(g_loss)
        g_optimizer.step()
        self.untoggle_optimizer(g_optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for D and for G."""
        d_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        g_optimizer = torch.optim.Adam(self.generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
        optimizers, plugins = {"d": d_optimizer, "g": g_optimizer}, [("r1", {"weight": 0.1}), "lecam"]
        self.attached = gankit.attach(self.generator, self.discriminator, plugins, optimizers=optimizers)
        return [d_optimizer, g_optimizer]


def train(steps: int = 100) -> list[float]:
    """The loss of D, step by step."""
    L.seed_everything(0, verbose=False)
    gan = GAN()
    loader = DataLoader(images(32 * steps), batch_size=32)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(gan, loader)
    return gan.losses


if __name__ == "__main__":
    print(f"D at last {train()[-1]:.3f}")
