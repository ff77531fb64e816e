"""MNIST from its four original IDX files, and the stacked digits made of it."""

import gzip
import importlib
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gankit.data.dataset import Dataset, Progress, Store, resized, seeded
from gankit.errors import UsageError
from gankit.files import cache_folder, expanded

STACKED_COUNT, STACKED_HELD_OUT = 128_000, 26_000
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {  # name without .gz: SHA-256 of the .gz
    "train-images-idx3-ubyte": "0b367032e93c5d0cea0925647cfdb18614af8ee15f83e6f2fc2ad904a6835971",
    "train-labels-idx1-ubyte": "1787548bbe0bff1ec2ecdc0ef292b02df999e2d1a6002d27500982c652b17203",
    "t10k-images-idx3-ubyte": "1a1a05eab793c14bb050b398624a11b0ffd1a2953baed553b1b9bd079e2a20be",
    "t10k-labels-idx1-ubyte": "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
}
_CLASSES = tuple(str(digit) for digit in range(10))


def mnist(data_root: str | None, image_size: int | None, progress: Progress | None) -> Dataset:
    """60,000 digits to train on, 10,000 held out, (1, 28, 28) unless image_size says otherwise.

    The test images are shuffled once, with a fixed seed: the first half of the original file is easier than
    the second, and `held_out(n)` should not see only that.
    """
    paths = find_files(data_root)
    train, labels, test, test_labels = read_files(paths, image_size, progress)
    order = torch.randperm(len(test), generator=seeded(21))
    return Dataset(
        "mnist",
        Store(train),
        Store(test, order),
        labels=labels,
        held_out_labels=test_labels[order],
        classes=_CLASSES,
        root=str(paths[0].parent),
    )


def stacked_mnist(data_root: str | None, image_size: int | None, progress: Progress | None) -> Dataset:
    """128,000 images of three MNIST digits drawn independently, one per colour channel, (3, 28, 28).

    1000 modes: the triples of digits. Held out are 26,000 triples of MNIST's test digits. Only the indices
    of the digits are kept; `batch` puts the channels together. `digits` (N, 3) holds the true digits. The
    digits of MNIST are not equally frequent, so the distribution itself is KL 0.0043 away from uniform modes,
    before the error of a finite sample. Setting of PacGAN (arXiv 1712.04086) and VEEGAN (arXiv 1705.07761).
    """
    paths = find_files(data_root)
    train, labels, test, _ = read_files(paths, image_size, progress)
    generator = seeded(22)
    rows = torch.randint(len(train), (STACKED_COUNT, 3), generator=generator)
    test_rows = torch.randint(len(test), (STACKED_HELD_OUT, 3), generator=generator)
    return Dataset(
        "stacked-mnist",
        Store(train, rows),
        Store(test, test_rows),
        digits=labels[rows],
        root=str(paths[0].parent),
    )


def read_idx(path: Path) -> Tensor:
    """Contents of an IDX file of unsigned bytes, gzipped or not, in the shape its header gives.

    Raises UsageError when it is not such a file or is cut short.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot read {path} ({error}): fetch the file again") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise UsageError(f"{path} is not an IDX file of bytes: fetch the file again")
    ndim = content[3]
    start = 4 + 4 * ndim
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], dtype=">u4"))
    if len(shape) != ndim or len(content) - start != math.prod(shape):
        raise UsageError(f"{path} holds {len(content)} bytes, which does not fit its own header: fetch it again")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def read_files(
    paths: list[Path], image_size: int | None, progress: Progress | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images (N, 1, H, W) uint8 and labels (N,) int64, then the same of the test set, of `find_files`' paths."""
    parts: list[Tensor] = []
    for done, path in enumerate(paths, start=1):
        parts.append(read_idx(path))
        if progress is not None:
            progress(done, len(paths))
    for images, labels, path in ((parts[0], parts[1], paths[0]), (parts[2], parts[3], paths[2])):
        if images.ndim != 3 or labels.shape != images.shape[:1] or len(labels) == 0 or int(labels.max()) > 9:
            raise UsageError(f"{path} and the file of its labels do not belong together: fetch both again")
    train, test = (images[:, None] for images in (parts[0], parts[2]))
    if image_size is not None:
        train, test = resized(train, image_size), resized(test, image_size)
    return train, parts[1].long(), test, parts[3].long()


def find_files(data_root: str | None) -> list[Path]:
    """Paths of MNIST's four files, from the first folder that has them all, or downloaded. UsageError without any."""
    roots = [expanded(root) for root in (data_root, os.environ.get("GANKIT_DATA")) if root]
    folders = [folder for root in roots for folder in (root, root / "mnist")]
    for folder in folders:
        found = [path for name in FILES if (path := _either(folder, name)) is not None]
        if len(found) == len(FILES):
            return found
    looked = f"in {', '.join(str(folder) for folder in folders)}" if folders else "nowhere: no folder is named"
    try:
        return _download()
    except ImportError as error:
        reason: Exception = error
        way = 'or run `pip install "gankit[download]"` to have them fetched'
    except Exception as error:  # whatever the network does; pooch names many kinds
        reason = error
        way = f"or make the download from {MIRROR} work (it failed: {error})"
    raise UsageError(
        f"MNIST was not found: its files {', '.join(FILES)} (each .gz or not) were looked for {looked}; "
        f"name the folder that holds them with --data-root (data_root) or in the variable GANKIT_DATA, {way}"
    ) from reason


def _either(folder: Path, name: str) -> Path | None:
    """Return the plain or the gzipped file of that name, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _download() -> list[Path]:
    """Fetch the four files into the user's cache, once, and check them against their SHA-256."""
    pooch: Any = importlib.import_module("pooch")
    pooch.get_logger().setLevel("WARNING")  # it would print what it fetches
    cache = pooch.create(
        path=cache_folder() / "mnist",
        base_url=MIRROR,
        registry={f"{name}.gz": f"sha256:{digest}" for name, digest in FILES.items()},
    )
    return [Path(cache.fetch(f"{name}.gz")) for name in FILES]
