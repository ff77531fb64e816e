"""Data sets: the built-in benchmarks, and anything of the user's own, in memory and in one form.

`load` takes a name (`NAMES`), a folder or .zip of images, a .npy, .npz or .csv file, or `module:callable`;
`summary` says what came out of it and warns of what will make training hard.
"""

from pathlib import Path

from gankit.data.arrays import array_file, from_arrays, from_callable, table
from gankit.data.dataset import Counter, Dataset, Modes, Progress, Store, check_image_size, need_utf8
from gankit.data.describe import Summary, summary
from gankit.data.digits import mnist, stacked_mnist
from gankit.data.images import SUFFIXES, image_folder
from gankit.data.junction import heavy_mode
from gankit.data.toy import gaussians1200, grid, ring
from gankit.errors import UsageError
from gankit.files import expanded
from gankit.options import closest

__all__ = ["NAMES", "Counter", "Dataset", "Modes", "Progress", "Store", "Summary", "from_arrays", "load", "summary"]

_TOYS = {"ring": ring, "grid": grid, "gaussians1200": gaussians1200}
_DIGITS = {"mnist": mnist, "stacked-mnist": stacked_mnist}
NAMES: tuple[str, ...] = (*_TOYS, "heavy-mode", *_DIGITS)


def load(
    spec: str,
    *,
    data_root: str | None = None,
    image_size: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Load a data set into memory; the same samples, in the same order and split, at every call.

    spec: one of `NAMES`; a folder or .zip of images; a .npy, .npz or .csv file; or `module:callable` or
    `./file.py:callable`. A name wins over a folder of that name (write `./ring` for the folder).
    data_root: where the files of MNIST lie (itself or its folder mnist), tried before the variable
    GANKIT_DATA. image_size: side in pixels to which images are brought. progress: called with (done, total).

    Raises UsageError, with what to do, for everything that cannot be loaded.
    """
    check_image_size(image_size)
    need_utf8(spec)
    path = expanded(spec)
    suffix = path.suffix.lower()
    if spec in _DIGITS:
        return _DIGITS[spec](data_root, image_size, progress)
    if data_root is not None:
        raise UsageError(f"data_root is where the files of MNIST lie, which {spec} does not need: leave it out")
    if image_size is not None and (spec in _TOYS or suffix == ".csv"):
        raise UsageError(f"image_size is for images, and {spec} holds vectors: leave it out")
    if spec in _TOYS:
        return _TOYS[spec]()
    if spec == "heavy-mode":
        return heavy_mode(image_size)
    if spec.strip() and (path.is_dir() or (path.is_file() and suffix == ".zip")):
        return image_folder(spec, path, image_size, progress)
    if path.is_file() and suffix in (".npy", ".npz"):
        return array_file(spec, path, image_size)
    if path.is_file() and suffix == ".csv":
        return table(spec, path)
    if (data := from_callable(spec, image_size, progress)) is not None:
        return data
    raise UsageError(_unknown(spec, path))


def _unknown(spec: str, path: Path) -> str:
    """Return the sentence for a spec that is nothing we know."""
    if path.is_file():
        if path.suffix.lower() in SUFFIXES:
            return f"{spec} is a single image: give the folder that holds it"
        return f"cannot read {spec}: give a folder or .zip of images, or a .npy, .npz or .csv file"
    if path.suffix or "/" in spec or "\\" in spec:
        return f"there is no file or folder {spec}: check the path"
    guess = closest(spec.lower().replace("_", "-"), NAMES)
    return f"there is no data set, file or folder {spec!r}{guess}; the names are {', '.join(NAMES)}"
