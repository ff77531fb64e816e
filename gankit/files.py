"""Files that are complete or absent, and code as its file says now."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from gankit.errors import UsageError

if sys.platform != "win32":
    import fcntl

FAILED = "failed.json"  # in the folder of a benchmark's run that failed: why


def expanded(path: str) -> Path:
    """A path with ``~`` replaced by the home it stands for; as it is where nobody has that name, unlike pathlib's."""
    return Path(os.path.expanduser(path))


def imported(path: Path, name: str) -> ModuleType:
    """The module in a file of Python, under a name in ``sys.modules``, as the file says now.

    Python tells kept bytecode from its file by length and second only, so that an edit within a second could run the
    code before it, under a hash of the code after it.
    """
    loader = _FromSource(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None  # a loader was given
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    loader.exec_module(module)
    return module


class _FromSource(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def cache_folder() -> Path:
    """Where gankit keeps what it fetched or computed once: the variable GANKIT_CACHE, or the system's place for that."""
    if chosen := os.environ.get("GANKIT_CACHE"):
        return expanded(chosen)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "gankit" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gankit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gankit"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint or of a picture; names of a million steps and more are longer."""
    return int(path.stem.rpartition("-")[2])


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError from within that names no file, as those of writing do, the name of this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that ``path`` is the old one or the whole new one, after a crash, too.

    A temporary neighbour of this process is written and synchronised, then renamed. Raises OSError that names the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)  # not the neighbour, of which nobody knows
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep a run's folder for this process; UsageError if another one, which is alive, has it."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of file systems that have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{folder} is being trained by another process: wait for it, or stop it") from None
        yield
    finally:
        os.close(descriptor)
