"""What is in a data set, and what about it will make training hard."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gankit.data.dataset import Dataset, scaled, seeded

_EXAMINED, _HASHED, _BYTES = 10_000, 20_000, 200_000_000
_RATIO, _LARGE = 100.0, 100.0


@dataclass(frozen=True)
class Summary:
    """Facts about a data set, and warnings.

    count: training samples. held_out: held-out samples. shape: of one sample. value_range: smallest and
    largest value as training sees them. channels: of an image, None for vectors. class_histogram: training
    samples per class, empty without classes. examined: training samples that the range and the warnings about
    values rest on; fewer than count means an estimate. warnings: sentences, the loader's notes first.
    """

    name: str
    count: int
    held_out: int
    shape: tuple[int, ...]
    value_range: tuple[float, float]
    channels: int | None
    class_histogram: dict[str, int]
    warnings: list[str]
    examined: int


def summary(data: Dataset) -> Summary:
    """Summarise a data set in at most about a second: values from up to 10,000 training samples.

    Duplicates are looked for among up to 20,000; fewer of both when samples are large.
    """
    bytes_each = data.train.items.element_size() * max(1, torch.Size(data.shape).numel())
    x = _some(data, min(_EXAMINED, max(100, _BYTES // 4 // bytes_each)))
    values = scaled(x)
    low, high = float(values.min()), float(values.max())
    histogram = _histogram(data)
    warnings = [
        *data.notes,
        *_class_warnings(histogram),
        *(_image_warnings(values, low, high) if data.is_image else _vector_warnings(data, values)),
        *_duplicates(_some(data, min(_HASHED, max(100, _BYTES // bytes_each))), len(data)),
    ]
    return Summary(
        name=data.name,
        count=len(data),
        held_out=len(data.test),
        shape=data.shape,
        value_range=(low, high),
        channels=data.shape[0] if data.is_image else None,
        class_histogram=histogram,
        warnings=warnings,
        examined=len(x),
    )


def _some(data: Dataset, n: int) -> Tensor:
    """Up to n training samples as stored, always the same ones."""
    index = torch.arange(len(data))
    if len(data) > n:
        index = torch.randperm(len(data), generator=seeded(31))[:n]
    return data.train.raw(index).cpu()


def _histogram(data: Dataset) -> dict[str, int]:
    """Return the number of training samples per class name."""
    if data.labels is None:
        return {}
    counts = torch.bincount(data.labels.cpu(), minlength=len(data.classes)).tolist()
    names = data.classes or tuple(str(k) for k in range(len(counts)))
    return dict(zip(names, counts, strict=True))


def _class_warnings(histogram: dict[str, int]) -> list[str]:
    if len(histogram) == 1:
        return [f"all samples are of one class, {next(iter(histogram))!r}: check the folders or labels"]
    if not histogram:
        return []
    most, least = max(histogram, key=histogram.__getitem__), min(histogram, key=histogram.__getitem__)
    if histogram[most] <= _RATIO * histogram[least]:
        return []
    counts = f"{histogram[most]:,} samples of {most!r}, {histogram[least]:,} of {least!r}"
    return [f"the classes are very unequal: {counts}"]


def _image_warnings(values: Tensor, low: float, high: float) -> list[str]:
    warnings = []
    flat = values.transpose(0, 1).flatten(1)
    constant = [k for k in range(len(flat)) if flat[k].min() == flat[k].max()]
    if constant:
        which = ", ".join(str(k) for k in constant)
        warnings.append(f"nothing varies in channel {which} of {len(flat)}: the images carry nothing there")
    elif high - low < 0.1:
        warnings.append(f"values only span {low:g} to {high:g} of -1 to 1: check how the images were scaled")
    if low < -1 or high > 1:
        warnings.append(f"values reach from {low:g} to {high:g}, and images should be in [-1, 1]: rescale them")
    return warnings


def _vector_warnings(data: Dataset, values: Tensor) -> list[str]:
    warnings = []
    names = data.features or tuple(f"feature {k}" for k in range(values.shape[1]))
    low, high = values.min(dim=0).values, values.max(dim=0).values
    constant = (low == high).nonzero().flatten().tolist()
    if constant:
        some = ", ".join(names[k] for k in constant[:5]) + (", ..." if len(constant) > 5 else "")
        warnings.append(f"{len(constant)} of {len(names)} features are constant ({some}): consider leaving them out")
    mean, std = values.double().mean(dim=0), values.double().std(dim=0, correction=0)
    varying = (low < high).nonzero().flatten()
    if len(varying) > 1:
        widest, narrowest = (int(varying[pick(std[varying])]) for pick in (torch.argmax, torch.argmin))
        if std[widest] > _RATIO * std[narrowest]:
            pair = " and ".join(f"{names[k]} (mean {mean[k]:.4g}, std {std[k]:.4g})" for k in (narrowest, widest))
            warnings.append(f"the scales of {pair} differ more than {_RATIO:.0f}-fold: consider standardising")
    largest = float(values.abs().max())
    if largest > _LARGE:
        warnings.append(f"values reach {largest:.4g} in size: networks train best on values near 1, rescale them")
    return warnings


def _duplicates(x: Tensor, count: int) -> list[str]:
    """Warn when samples repeat one another bit by bit; by 64-bit hashes of their bytes."""
    rows = x.numpy()
    repeated = len(rows) - len({hash(row.tobytes()) for row in rows})
    if repeated == 0:
        return []
    among = f"the {len(rows):,} samples" + ("" if len(rows) == count else f" looked at of {count:,}")
    return [f"{repeated:,} of {among} are exact copies of another one"]
