"""A small classifier of MNIST's digits, the same on every machine: who counts the modes of stacked MNIST.

Also the feature extractor of choice for images of digits, on which networks made for photographs say little.
"""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gankit.data import Progress
from gankit.data.dataset import scaled
from gankit.data.digits import find_files, read_files
from gankit.files import cache_folder, write_atomic
from gankit.gan import seeded, threads
from gankit.provenance import hash_of

SHIPPED = Path(__file__).parent / "weights"
FEATURES = 128  # per image of one digit
SIZE = 28
RECIPE = "1: conv 16-32-64, 128 features; AdamW 0.005, 2 epochs of batches of 128, shifts of 1 pixel, seed 0"
EPOCHS, BATCH, RATE, SHIFT, WARMUP = 2, 128, 5e-3, 1, 0.15


class Classifier(nn.Module):
    """Digits in every channel of images (B, C, H, W) in [-1, 1]; sizes other than 28 pixels are resized to it.

    accuracy: share of MNIST's test digits it labels right. hash: of its weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(9 * 64, FEATURES, bias=False), nn.BatchNorm1d(FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, 10)
        self.accuracy = 0.0
        self.hash = ""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) -> features (B, C, 128) and logits (B, C, 10)."""
        single = x.flatten(0, 1).unsqueeze(1)
        if single.shape[-2:] != (SIZE, SIZE):
            # the filter that made larger digits of MNIST's: blunter ones cost accuracy
            single = F.interpolate(single, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False).clamp(
                -1, 1
            )
        found = self.body(single)
        return found.unflatten(0, x.shape[:2]), self.head(found).unflatten(0, x.shape[:2])

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees, channel after channel: (B, C, H, W) -> (B, C * 128)."""
        found: Tensor = self(x)[0]
        return found.flatten(1)

    def logits(self, x: Tensor) -> Tensor:
        """Ten logits per channel: (B, C, H, W) -> (B, C, 10)."""
        found: Tensor = self(x)[1]
        return found

    @torch.no_grad()
    def labels(self, x: Tensor, batch: int = 500) -> Tensor:
        """The digit in every channel, computed ``batch`` images at a time: (N, C, H, W) -> (N, C) int64."""
        return torch.cat([self.logits(part).argmax(dim=2) for part in torch.split(x, batch)])


def digits(data_root: str | None = None, progress: Progress | None = None) -> Classifier:
    """The classifier of MNIST's digits, in evaluation mode on the CPU.

    data_root: where the files of MNIST lie, as for ``load("mnist")``. That of MNIST itself comes with gankit: what `train`
    makes differs in its last bits from processor to processor, and scores by two classifiers are not comparable. For any
    other images one is trained at the first call and kept in ``cache_folder()``, in a file that belongs to these very
    images and this recipe; one that is broken is made anew. progress: called with (step, steps) in training, which takes
    under a minute of one CPU core, on one thread and with random numbers of its own, so that a machine always gets
    the same weights; nobody else's random numbers are touched. UsageError where MNIST cannot be found.
    """
    parts = dict(zip(("x", "y", "test_x", "test_y"), read_files(find_files(data_root), None, None), strict=True))
    data = hash_of(parts)
    name = f"digits-{data}-{RECIPE.partition(':')[0]}.safetensors"
    path = cache_folder() / "classifier" / name
    if (known := _read(SHIPPED / name) or _read(path)) is not None:
        return known
    made = train(parts["x"], parts["y"], progress)
    made.accuracy = (made.labels(scaled(parts["test_x"])).squeeze(1) == parts["test_y"]).double().mean().item()
    made.hash = hash_of(made.state_dict())
    facts = {"accuracy": repr(made.accuracy), "hash": made.hash, "data": data, "recipe": RECIPE}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, safetensors.torch.save(made.state_dict(), facts))
    return made


def _read(path: Path) -> Classifier | None:
    """The classifier in a file; None if there is no such file, or it is not whole."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = file.metadata()
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (FileNotFoundError, safetensors.SafetensorError):
        return None
    if not facts or facts.get("hash") != hash_of(weights):
        return None
    with seeded(0):
        known = Classifier()
    known.load_state_dict(weights)
    known.accuracy, known.hash = float(facts["accuracy"]), facts["hash"]
    return known.eval().requires_grad_(False)


def train(x: Tensor, y: Tensor, progress: Progress | None = None) -> Classifier:
    """A classifier trained on digits x (N, 1, 28, 28) uint8 with labels y (N,), in evaluation mode.

    Cross-entropy; the rate rises linearly for the first 15 % of the steps and then falls linearly to 0.
    """
    batch = min(BATCH, len(x))
    per_epoch = len(x) // batch
    steps, step = EPOCHS * per_epoch, 0
    generator = torch.Generator().manual_seed(0)
    with seeded(0, "classifier"), threads(1):
        made = Classifier()
        made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # in three fifths of the time
        optimizer = torch.optim.AdamW(made.parameters(), lr=RATE, weight_decay=1e-2)
        for _ in range(EPOCHS):
            order = torch.randperm(len(x), generator=generator)
            for index in torch.split(order[: per_epoch * batch], batch):
                shift = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=generator).tolist()
                shown = torch.roll(scaled(x[index]), shift, (2, 3)).contiguous(memory_format=torch.channels_last)
                optimizer.param_groups[0]["lr"] = RATE * _rate((step + 0.5) / steps)
                loss = F.cross_entropy(made.logits(shown).squeeze(1), y[index])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
                if progress is not None:
                    progress(step, steps)
        made.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return made.eval().requires_grad_(False)


def _rate(done: float) -> float:
    return min(done / WARMUP, (1 - done) / (1 - WARMUP))
