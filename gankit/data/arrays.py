"""Arrays, tables and Python callables as data sets."""

import csv
import importlib
import io
import re
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from gankit.data.dataset import Dataset, Progress, resized, split_dataset
from gankit.errors import UsageError
from gankit.files import expanded, imported

_MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-"}
_KEYS, _LABEL_KEYS = ("x", "data", "images"), ("y", "labels")
_CALLABLE = re.compile(r"(?P<module>.+\.py|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)")

Array = NDArray[Any]


def from_arrays(
    name: str,
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor | None = None,
    *,
    image_size: int | None = None,
    features: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Dataset:
    """Dataset of an array, a tenth of it held out.

    x: (N,) or (N, D) vectors, kept as they are; (N, H, W), (N, C, H, W) or (N, H, W, C) images, channels last
    when the last axis is 1, 3 or 4 long and the second is not. Images of 0..255 and of [0, 1] are brought to
    [-1, 1], floats within [-1, 1] stay, other values are mapped linearly, with a note.
    y: (N,) class labels of any kind, or None. features: names of the D columns.

    Raises UsageError for anything else, for NaN or infinity, and for fewer than 2 samples.
    """
    values = _as_numpy(x)
    if values.dtype.kind not in "buif":
        raise UsageError(f"{name} holds {values.dtype} values: give an array of numbers")
    if values.ndim not in (1, 2, 3, 4) or 0 in values.shape[1:]:
        raise UsageError(f"{name} has shape {values.shape}: expected (N, D), (N, H, W), (N, C, H, W) or (N, H, W, C)")
    labels, classes, label_notes = _labels(name, y, len(values))
    if values.ndim <= 2:
        if image_size is not None:
            raise UsageError(f"image_size is for images, and {name} holds vectors: leave it out")
        items, image_notes = _floats(values.reshape(len(values), -1)), tuple[str, ...]()
    else:
        items, image_notes = _images(name, values)
        if image_size is not None:
            items = resized(items, image_size)
    return split_dataset(name, items, labels, classes, features=features, notes=(*notes, *label_notes, *image_notes))


def array_file(spec: str, path: Path, image_size: int | None) -> Dataset:
    """A .npy file, or a .npz with one array or one called x, data or images, and labels in y or labels."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return from_arrays(spec, loaded, image_size=image_size)
        with loaded:
            keys = list(loaded.files)
            y = next((key for key in _LABEL_KEYS if key in keys), None)
            arrays = [key for key in keys if key not in _LABEL_KEYS]
            x = next((key for key in _KEYS if key in keys), arrays[0] if len(arrays) == 1 else None)
            if x is None:
                raise UsageError(
                    f"{spec} holds the arrays {', '.join(keys) or '(none)'}: call the samples one of "
                    f"{', '.join(_KEYS)} (and the labels, if any, {' or '.join(_LABEL_KEYS)})"
                )
            return from_arrays(spec, loaded[x], None if y is None else loaded[y], image_size=image_size)
    except UsageError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"cannot read {spec} as an array of numbers ({error}): save it anew") from error


def table(spec: str, path: Path) -> Dataset:
    """The numeric columns of a .csv (comma, semicolon or tab; with or without a header) as vectors (N, D).

    The first line is a header when none of its cells is a number. Decimal commas are understood unless the
    comma separates cells. Notes name columns that are left out since they hold text, and count the rows that
    are left out since a cell is missing (empty, NA, nan, null, none, ? or -).

    Raises UsageError when no column is numeric or a line has more or fewer cells than the first.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {spec} ({error}): save it as a text file in UTF-8") from error
    rows: list[list[str]] = []
    line = 0
    try:
        separator = _separator(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        for row in reader:
            line = reader.line_num
            if not any(cell.strip() for cell in row):
                continue
            if rows and len(row) != len(rows[0]):
                raise UsageError(
                    f"line {line} of {spec} has {len(row)} cells where the first has {len(rows[0])}: correct or remove it"
                )
            rows.append(row)
    except csv.Error as error:
        raise UsageError(
            f"cannot read {spec} after line {line} ({error}): is a quotation mark left open there?"
        ) from error
    if not rows:
        raise UsageError(f"{spec} is empty: give a table with at least one numeric column")
    has_header = not any(_is_number(cell, separator) for cell in rows[0])
    names = [cell.strip() for cell in rows[0]] if has_header else [f"column {k + 1}" for k in range(len(rows[0]))]
    columns = [_numbers(column, separator) for column in zip(*rows[has_header:], strict=True)]
    return _from_columns(spec, dict(enumerate(names)), columns)


def from_callable(spec: str, image_size: int | None, progress: Progress | None) -> Dataset | None:
    """What `module:callable` or `file.py:callable` returns; None when spec is not of that form.

    The callable takes no argument and returns a tensor or array (N, ...), a pair (x, y) of such, a gankit
    Dataset, or a torch Dataset or other iterable of samples or (sample, label) pairs, which is read into
    memory. Raises UsageError when it cannot be found or fails, with the place of the failure.
    """
    match = _CALLABLE.fullmatch(spec)
    if match is None:
        return None
    module_name, name = match["module"], match["name"]
    file = expanded(module_name) if module_name.endswith(".py") else None
    if file is not None and not file.is_file():
        raise UsageError(f"there is no file {module_name}: give the path of the file that defines {name}")
    with _importable(file.parent if file else Path.cwd()):
        try:
            result = _attribute(_module(module_name, file), name)()
            x, y = _samples(spec, result, progress)
        except UsageError:
            raise
        except ModuleNotFoundError as error:
            raise UsageError(f"{spec} needs the module {error.name!r}, which cannot be imported") from error
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if where.filename == __file__ else f" (line {where.lineno} of {where.filename})"
            raise UsageError(f"{spec} failed with {type(error).__name__}: {error}{place}") from error
    if not isinstance(x, Dataset):
        return from_arrays(spec, x, y, image_size=image_size)
    if image_size is not None:
        raise UsageError(f"{spec} returns a Dataset, which has the size it has: leave image_size out")
    return x


def _as_numpy(values: ArrayLike | Tensor) -> Array:
    """Any array as numpy; floats of a tensor become float32."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    known: Array = (values.float() if values.is_floating_point() else values).numpy()  # bfloat16 is unknown
    return known


def _floats(values: Array) -> Tensor:
    """Return values in float32; what is too large for it becomes infinite and is refused later."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


def _images(name: str, values: Array) -> tuple[Tensor, tuple[str, ...]]:
    """Images (N, C, H, W) as uint8, or float32 in [-1, 1], and notes on how they were mapped."""
    if values.ndim == 3:
        values = values[:, None]
    elif values.shape[3] in (1, 3, 4) and values.shape[1] not in (1, 3, 4):
        values = values.transpose(0, 3, 1, 2)
    if values.dtype.kind == "b":
        values = values * np.uint8(255)
    if len(values) == 0 or (values.dtype.kind == "f" and not np.isfinite(values).all()):
        return _floats(values), ()  # refused by split_dataset
    low, high = float(values.min()), float(values.max())
    if values.dtype == np.uint8 or (values.dtype.kind in "iu" and low >= 0 and 1 < high <= 255):
        return torch.from_numpy(np.require(values, np.uint8, ["C", "W"])), ()
    if low >= 0 and high <= 1:
        return _floats(values) * 2 - 1, ()
    if low >= -1 and high <= 1:
        return _floats(values), ()
    start, end = (0.0, 255.0) if low >= 0 and high <= 255 else (low, high)
    note = f"{name} has values from {low:g} to {high:g}: {start:g} .. {end:g} was mapped to -1 .. 1"
    return _floats((values.astype(np.float64) - start) * (2 / (end - start)) - 1).clamp_(-1, 1), (note,)


def _labels(
    name: str, given: ArrayLike | Tensor | None, count: int
) -> tuple[Tensor | None, tuple[str, ...], tuple[str, ...]]:
    """Class indices (N,), class names in sorted order, and notes."""
    if given is None:
        return None, (), ()
    y = _as_numpy(given)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (count,):
        raise UsageError(f"the labels of {name} have shape {y.shape}: expected ({count},), one per sample")
    if y.dtype.kind not in "buifUS":
        raise UsageError(f"the labels of {name} are {y.dtype} values: give whole numbers or text")
    if y.dtype.kind == "f":
        if not (np.isfinite(y).all() and (y == np.round(y)).all()):
            return None, (), (f"the labels of {name} are not whole numbers, so they are left out",)
        y = y.astype(np.int64)
    values, index = np.unique(y.astype(str) if y.dtype.kind == "S" else y, return_inverse=True)
    return torch.from_numpy(index.reshape(-1).astype(np.int64)), tuple(str(v) for v in values.tolist()), ()


def _separator(text: str) -> str:
    """Semicolon, tab or comma: the first that cuts the first 20 lines into equally many cells, at least two.

    csv.Sniffer takes the comma of "1,5;2,5" for a separator and gives up on a single column.
    """
    lines = [line for line in text[:100_000].splitlines() if line.strip()][:20]
    for separator in ";\t,":
        lengths = {len(row) for row in csv.reader(lines, delimiter=separator)}
        if len(lengths) == 1 and lengths.pop() > 1:
            return separator
    return ","


def _is_number(cell: str, separator: str) -> bool:
    """Whether a cell is a number."""
    return _numbers((cell,), separator) is not None


def _numbers(column: tuple[str, ...], separator: str) -> Array | None:
    """Column as float64 with NaN for missing cells, or None when a cell is text or every cell is missing."""
    cells = ["nan" if cell.strip().lower() in _MISSING else cell for cell in column]
    if separator != ",":
        cells = [cell.replace(",", ".") for cell in cells]
    try:
        numbers = np.array(cells, dtype=np.float64)
    except ValueError:
        return None
    return None if np.isnan(numbers).all() else numbers


def _from_columns(spec: str, names: dict[int, str], columns: list[Array | None]) -> Dataset:
    """Dataset of the columns that are numbers, in complete rows."""
    notes: list[str] = []
    text = [names[k] for k, column in enumerate(columns) if column is None]
    numeric = {k: column for k, column in enumerate(columns) if column is not None}
    if text:
        notes.append(f"columns of {spec} without numbers are left out: {', '.join(text)}")
    if len(numeric) > 1 and names[0] == "" and 0 in numeric:
        first = numeric[0]
        if (first == np.arange(len(first)) + first[0]).all():
            del numeric[0]
            notes.append(f"the first column of {spec} has no name and only counts the rows: it is left out")
    if not numeric:
        raise UsageError(f"{spec} has no column of numbers: give a table with at least one")
    x = np.stack(list(numeric.values()), axis=1)
    complete = ~np.isnan(x).any(axis=1)
    if not complete.all():
        notes.append(f"{int((~complete).sum())} of {len(x)} rows of {spec} have missing cells and are left out")
        if complete.sum() < 2:
            raise UsageError(f"only {int(complete.sum())} of {len(x)} rows of {spec} have no missing cell: fill them")
    return from_arrays(spec, x[complete], features=tuple(names[k] for k in numeric), notes=tuple(notes))


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules of a folder be imported for a while."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _module(name: str, file: Path | None) -> ModuleType:
    """Return the module of that dotted name or in that file."""
    return importlib.import_module(name) if file is None else imported(file, f"_gankit_data_{file.stem}")


def _attribute(module: ModuleType, name: str) -> Callable[[], object]:
    """Return the callable of that name in a module."""
    try:
        found = attrgetter(name)(module)
    except AttributeError as error:
        raise UsageError(f"{module.__file__} does not define {name}: correct the name") from error
    if not callable(found):
        raise UsageError(f"{name} in {module.__file__} is not callable: give a function that returns the data")
    return cast("Callable[[], object]", found)


def _samples(
    spec: str, result: object, progress: Progress | None
) -> tuple[Dataset | ArrayLike | Tensor, ArrayLike | Tensor | None]:
    """Samples x and labels y, if any, from whatever a callable returned."""
    if isinstance(result, Dataset | Tensor | np.ndarray):
        return result, None
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor | np.ndarray):
        return result
    if isinstance(result, DataLoader):
        result = result.dataset
    readable = isinstance(result, Iterable) or hasattr(result, "__getitem__")
    if isinstance(result, str | bytes | dict) or not readable:
        raise UsageError(
            f"{spec} returned {type(result).__name__}: return an array (N, ...), a pair (x, y) of arrays, or "
            "an iterable of samples"
        )
    return _collect(spec, cast("Iterable[object]", result), progress)


def _collect(spec: str, samples: Iterable[object], progress: Progress | None) -> tuple[Array, Array | None]:
    """Stack an iterable of samples or (sample, label) pairs: x (N, ...), y (N,) or None."""
    total = len(samples) if isinstance(samples, Sized) else 0
    if total and hasattr(samples, "__getitem__"):  # a torch Dataset need not end when it is iterated
        samples = map(samples.__getitem__, range(total))
    x: list[Array] = []
    y: list[object] = []
    for sample in samples:
        value = sample
        if isinstance(sample, tuple) and len(sample) == 1:  # of a TensorDataset without labels
            (value,) = sample
        elif isinstance(sample, tuple) and len(sample) == 2 and not isinstance(sample[0], int | float):
            value, label = sample
            y.append(label.item() if isinstance(label, Tensor | np.generic) else label)
        value = _as_numpy(cast("ArrayLike | Tensor", value))
        if x and value.shape != x[0].shape:
            shapes = f"shape {value.shape} and the first {x[0].shape}"
            raise UsageError(f"sample {len(x)} of {spec} has {shapes}: make them equal")
        x.append(value)
        if progress is not None:
            progress(len(x), total)
    if progress is not None and not total:
        progress(len(x), len(x))
    if not x:
        raise UsageError(f"{spec} gave no sample, and at least 2 are needed to train on")
    return np.stack(x), np.asarray(y) if y else None
