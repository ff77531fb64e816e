"""A folder or a .zip of images, with classes from its first level of folders."""

import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps

from gankit.data.dataset import Dataset, Progress, need_utf8, split_dataset
from gankit.errors import UsageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
DEFAULT_SIZE = 32
LARGEST_KEPT = 64  # pixels a side; nobody means to train on photographs as they come from a camera
_UNREADABLE = (
    OSError, ValueError, SyntaxError, RuntimeError, NotImplementedError, EOFError, struct.error, zlib.error,
    zipfile.BadZipFile, Image.DecompressionBombError,
)  # fmt: skip
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)  # EXIF: the values that swap width and height

T = TypeVar("T")
Opener = Callable[[], IO[bytes]]
Entry = tuple[tuple[str, ...], Opener]  # path inside the folder or archive, and how to open it


def image_folder(spec: str, path: Path, image_size: int | None, progress: Progress | None) -> Dataset:
    """Images under a folder or in a .zip, nested as deep as one likes, as (C, size, size).

    Hidden files and __MACOSX are ignored. Classes are the first-level folders when all images lie in such,
    and there are none when an image lies at the top; a single top folder of class folders is stepped into.
    RGB when any image has colour, else grey; transparency is dropped, EXIF rotation applied, and of an
    animation the first frame taken. The size is image_size or, when all images are squares of one size up to
    64, theirs; otherwise the centre squares are resized to 32 (antialiased bicubic), which `notes` say.

    Raises UsageError when there is no image or one cannot be read.
    """
    with _opened(path) as found:
        entries = sorted(found, key=lambda entry: entry[0])
        if not entries:
            raise UsageError(f"there is no image in {spec}: looked for {', '.join(SUFFIXES)} at any depth")
        labels, classes, notes = _classes(spec, _step_in([parts for parts, _ in entries]))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            headers = list(pool.map(lambda entry: _read(spec, entry, _header), entries))
            channels = 3 if any(colour for colour, _ in headers) else 1
            size, resize_notes = _target(spec, image_size, [wh for _, wh in headers])
            _check_memory(spec, len(entries) * channels * size * size)
            pixels = np.empty((len(entries), channels, size, size), np.uint8)

            def decode(i: int) -> None:
                pixels[i] = _read(spec, entries[i], lambda image: _pixels(image, channels, size))

            for done, _ in enumerate(pool.map(decode, range(len(entries))), start=1):
                if progress is not None:
                    progress(done, len(entries))
    return split_dataset(spec, torch.from_numpy(pixels), labels, classes, notes=(*notes, *resize_notes))


@contextmanager
def _opened(path: Path) -> Iterator[list[Entry]]:
    """Entries of the images in a folder or a zip, readable while the context lasts."""
    if path.is_dir():
        yield list(_walk(path))
        return
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read {path} as a zip file ({error}): create or fetch it again") from error
    with archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        split = [(tuple(name.replace("\\", "/").split("/")), name) for name in names]
        yield [(parts, partial(archive.open, name)) for parts, name in split if _wanted(parts)]


def _walk(root: Path) -> Iterator[Entry]:
    """Images under root; linked folders are followed, each once."""
    seen: set[str] = set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        for name in files:
            file = Path(folder, name)
            parts = file.relative_to(root).parts
            if _wanted(parts):
                yield parts, partial(_open, file)


def _open(file: Path) -> IO[bytes]:
    return file.open("rb")


def _wanted(parts: tuple[str, ...]) -> bool:
    """Whether a path is an image, and neither hidden nor one of the copies macOS puts into archives."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(SUFFIXES)


def _step_in(paths: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Paths without the leading folders that merely hold all class folders."""
    while all(len(parts) > 2 and parts[0] == paths[0][0] for parts in paths):
        paths = [parts[1:] for parts in paths]
    return paths


def _classes(spec: str, paths: list[tuple[str, ...]]) -> tuple[torch.Tensor | None, tuple[str, ...], tuple[str, ...]]:
    """Labels, class names and notes from the first-level folders."""
    folders = [parts[0] for parts in paths if len(parts) > 1]
    if len(folders) < len(paths):
        mixed = f"{spec} has images both beside and in folders: no classes are made" if folders else ""
        return None, (), (mixed,) if mixed else ()
    classes = tuple(sorted(set(folders)))
    for name in classes:
        need_utf8(name)
    number = {name: k for k, name in enumerate(classes)}
    parts_of_data = {"train", "test", "val", "valid", "validation"}
    note = f"the classes of {spec} are called {', '.join(classes)}: to train on one part, name its folder"
    notes = (note,) if {name.lower() for name in classes} <= parts_of_data else ()
    return torch.tensor([number[name] for name in folders]), classes, notes


def _read(spec: str, entry: Entry, use: Callable[[Image.Image], T]) -> T:
    """Return what use makes of the opened image; UsageError naming the file when it cannot be read."""
    parts, opener = entry
    try:
        with opener() as file, Image.open(file) as image:
            return use(image)
    except _UNREADABLE as error:
        raise UsageError(
            f"cannot read the image {'/'.join(parts)} in {spec} ({error}): remove or replace it"
        ) from error


def _header(image: Image.Image) -> tuple[bool, tuple[int, int]]:
    """Whether an image has colour, and its upright width and height; only a palette makes it decode."""
    width, height = image.size
    if "exif" in image.info and image.getexif().get(_ORIENTATION) in _SIDEWAYS:  # else PNG would be decoded
        width, height = height, width
    if image.mode == "P":
        palette = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
        return bool((palette != palette[:, :1]).any()), (width, height)
    return image.mode not in _GREY, (width, height)


def _target(spec: str, image_size: int | None, sizes: list[tuple[int, int]]) -> tuple[int, tuple[str, ...]]:
    """Side of the squares to deliver and what to say about it."""
    counts = Counter(sizes)
    (width, height), _ = counts.most_common(1)[0]
    if image_size is None:
        if len(counts) == 1 and width == height <= LARGEST_KEPT:
            return width, ()
        what = (
            f"the images of {spec} are {width}x{height}"
            if len(counts) == 1
            else f"the images of {spec} have {len(counts)} different sizes (most often {width}x{height})"
        )
        note = f"{what}: cropped to the centre square and resized to {DEFAULT_SIZE}x{DEFAULT_SIZE}; "
        return DEFAULT_SIZE, (note + "choose another size with image_size",)
    small = sum(count for wh, count in counts.items() if min(wh) < image_size)
    note = f"{small} of the {len(sizes)} images of {spec} are smaller than {image_size} pixels and were enlarged"
    return image_size, (note,) if small else ()


def _check_memory(spec: str, needed: int) -> None:
    """Refuse what cannot fit into this machine's memory, where the machine says how much that is."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    if needed > 0.8 * total:
        raise UsageError(
            f"the images of {spec} need {needed / 1e9:.0f} GB and this machine has {total / 1e9:.0f} GB: "
            "choose a smaller image_size"
        )


def _pixels(image: Image.Image, channels: int, size: int) -> np.ndarray:
    """Pixels (C, size, size) uint8 of the upright image's centre square."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # or Pillow warns
    square = upright.convert("L" if channels == 1 else "RGB")
    side = min(square.size)
    if square.size != (size, size):
        left, top = (square.width - side) // 2, (square.height - side) // 2
        box = (left, top, left + side, top + side)
        square = square.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.asarray(square).reshape(size, size, channels).transpose(2, 0, 1)
