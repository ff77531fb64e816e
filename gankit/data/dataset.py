"""What every data set is once it is loaded: samples in memory that can be indexed."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from gankit.errors import UsageError
from gankit.metrics import mode_metrics

Progress = Callable[[int, int], None]
"""Called with (done, total) while something slow is read; total is 0 when it is not known."""

_HELD_OUT_SEED = 1


class Counter(Protocol):
    """What knows the modes of a data set and counts them in samples."""

    def metrics(self, samples: Tensor) -> dict[str, float]:
        """Metrics by name, "modes" and "high_quality" among them, of samples (N, \\*shape)."""

    def to(self, device: torch.device | str) -> "Counter":
        """Return the same on another device."""


@dataclass(frozen=True, eq=False)
class Modes:
    """The modes of a data set that is a mixture of equally likely ones with known centres.

    centers: (K, D) float32. std: standard deviation per noisy coordinate. radius: a sample is of high
    quality when its Euclidean distance to the nearest centre is at most this.
    """

    centers: Tensor
    std: float
    radius: float

    def metrics(self, samples: Tensor) -> dict[str, float]:
        """``gankit.metrics.mode_metrics`` of samples (N, D)."""
        return mode_metrics(samples, self.centers, self.radius)

    def to(self, device: torch.device | str) -> "Modes":
        """Return the same modes on another device."""
        return replace(self, centers=self.centers.to(device))


@dataclass(frozen=True, eq=False)
class Store:
    """Samples as they are kept, uint8 (images) or float32.

    items: (M, *shape). rows chooses and combines them: None, sample i is items[i]; (N,) int64, sample i is
    items[rows[i]]; (N, C) int64, sample i has the one-channel images items[rows[i]] as its C channels.
    """

    items: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.items if self.rows is None else self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        shape = tuple(self.items.shape[1:])
        if self.rows is None or self.rows.ndim == 1:
            return shape
        return (self.rows.shape[1] * shape[0], *shape[1:])

    def raw(self, index: Tensor) -> Tensor:
        """Samples at index (B,), as stored: (B, *shape), uint8 or float32, never a view of the store."""
        index = index.to(self.items.device)
        if self.rows is None:
            return self.items[index]
        rows = self.rows[index]
        return self.items[rows] if rows.ndim == 1 else self.items[rows].flatten(1, 2)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory: indexed by a tensor, without workers and without randomness.

    name: how messages call it. train, test: the samples; test is never trained on. labels: (N,) int64, class
    per training sample; held_out_labels, the same for `held_out`. classes: class names, or ().
    modes: who counts them, for data whose modes are known. digits: (N, 3) int64, the digit in each channel (stacked-mnist).
    features: column names of tabular data. notes: what loading changed or left out; `summary` repeats them.
    root: the folder MNIST's files were found in, for who reads them once more.
    """

    name: str
    train: Store
    test: Store
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    modes: Counter | None = None
    held_out_labels: Tensor | None = None
    digits: Tensor | None = None
    features: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    root: str | None = None

    def __len__(self) -> int:
        """Return the number of training samples."""
        return len(self.train)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (D,) or (C, H, W)."""
        return self.train.shape

    @property
    def is_image(self) -> bool:
        """Whether a sample is an image (C, H, W)."""
        return len(self.shape) == 3

    @property
    def device(self) -> torch.device:
        """Where the samples lie and where `batch` delivers them."""
        return self.train.items.device

    def batch(self, index: Tensor) -> Tensor:
        """Training samples at index, (B,) int64 -> (B, *shape) float32 on the data's device.

        Images are in [-1, 1]; other samples are as they were given.
        """
        return scaled(self.train.raw(index))

    def held_out(self, n: int) -> Tensor:
        """Up to n samples that are never trained on, scaled as in `batch`; the same ones at every call.

        The first m of `held_out(n)` are `held_out(m)`. Raises UsageError for a negative n.
        """
        if n < 0:
            raise UsageError(f"the number of held-out samples must be 0 or more, not {n}")
        return scaled(self.test.raw(torch.arange(min(n, len(self.test)))))

    def sketch(self) -> dict[str, object]:
        """What tells these data from others, in values that JSON has: counts, and mean and deviation of some of the samples.

        Rounded, for a processor may have drawn another last bit.
        """
        found: dict[str, object] = {"shape": list(self.shape)}
        for name, store in (("train", self.train), ("test", self.test)):
            some = torch.linspace(0, len(store) - 1, min(1024, len(store)), dtype=torch.float64).long()
            x = store.raw(some).double()
            deviation = x.std(correction=0).item()
            mean = round(x.mean().item() / (deviation or 1.0), 3)
            found[name] = {"count": len(store), "mean / std": mean, "std": float(f"{deviation:.3g}")}
        return found

    def to(self, device: torch.device | str) -> "Dataset":
        """Return the same data on another device; the original stays where it is."""
        moved: dict[int, Tensor] = {}  # train and test may share one big tensor: move it once

        def move(value: Tensor) -> Tensor:
            if id(value) not in moved:
                moved[id(value)] = value.to(device)
            return moved[id(value)]

        def store(value: Store) -> Store:
            return Store(move(value.items), None if value.rows is None else move(value.rows))

        tensors = {
            field.name: move(value) for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)
        }
        modes = self.modes and self.modes.to(device)
        return replace(self, train=store(self.train), test=store(self.test), modes=modes, **tensors)  # type: ignore[arg-type]


def scaled(raw: Tensor) -> Tensor:
    """Stored samples as the networks see them: uint8 -> x / 127.5 - 1 in float32; float32 unchanged."""
    return raw.float().div_(127.5).sub_(1) if raw.dtype == torch.uint8 else raw


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator of the data's own: a data set is the same in every run, whatever its seed."""
    return torch.Generator().manual_seed(seed)


def split(count: int) -> tuple[Tensor, Tensor]:
    """Rows to train on (in order) and rows held out: a fixed random tenth, at least 1 and at most 10,000."""
    held = min(max(1, count // 10), 10_000)
    order = torch.randperm(count, generator=seeded(_HELD_OUT_SEED))
    return order[held:].sort().values, order[:held]


def split_dataset(
    name: str,
    items: Tensor,
    labels: Tensor | None = None,
    classes: tuple[str, ...] = (),
    *,
    features: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Dataset of items (N, *shape), uint8 images or float32, of which a fixed random tenth is held out.

    labels: (N,) int64 or None. Raises UsageError when there are fewer than 2 samples or a value is NaN or
    infinite.
    """
    if len(items) < 2:
        raise UsageError(f"{name} has {len(items)} sample(s), and at least 2 are needed to train on")
    if items.is_floating_point() and not (finite := items.isfinite()).all():
        first = tuple(int(i) for i in (~finite).nonzero()[0])
        at = f"sample {first[0]}, feature {features[first[1]]!r}" if features else f"index {first}"
        raise UsageError(
            f"{name} has {int((~finite).sum())} value(s) that are NaN or infinite, the first at {at}: "
            "remove or replace them before training"
        )
    train, test = split(len(items))
    return Dataset(
        name,
        Store(items, train),
        Store(items, test),
        labels=None if labels is None else labels[train],
        held_out_labels=None if labels is None else labels[test],
        classes=classes,
        features=features,
        notes=notes,
    )


def need_utf8(name: str) -> None:
    """UsageError for a name of a file that is no UTF-8, which could be neither printed nor written down."""
    if any("\ud800" <= letter <= "\udfff" for letter in name):  # how Python stands in for other bytes
        raise UsageError(f"the name {name!a} is not in UTF-8: rename it, for example with convmv")


def check_image_size(image_size: int | None) -> None:
    """Raise UsageError unless image_size is None or a positive number of pixels."""
    if image_size is not None and image_size < 1:
        raise UsageError(f"image_size must be 1 or more pixels, not {image_size}")


def resized(images: Tensor, size: int) -> Tensor:
    """Centre square of images (N, C, H, W), resized to size x size with an antialiased bicubic filter.

    Keeps the dtype, and the range of the values (the filter overshoots). Agrees with Pillow on uint8.
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if (height, width) == (size, size):
        return images
    low, high = images.min(), images.max()
    out = images.new_empty((*images.shape[:2], size, size))
    for start in range(0, len(images), 1024):  # in pieces, for the memory of what lies between
        piece = images[start : start + 1024, :, top : top + side, left : left + side]
        piece = torch.nn.functional.interpolate(piece, size=(size, size), mode="bicubic", antialias=True)
        out[start : start + 1024] = piece.clamp(low, high)
    return out
