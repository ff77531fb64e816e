"""A run on disk: what was asked, what happened, and states to continue from. Whatever is there is complete.

00003-ring-pairwise_gp/
    config.toml     every setting, resolved; `gankit run --config` accepts it
    plugins.json    name, distribution and version of each plugin
    env.json        versions, machine, threads; the state of the code of own networks
    data.json       summary of the data, and a sketch of their content
    stats.jsonl     losses by term, gradient shares, costs, every --log-every steps
    signals.jsonl   signs of health at every evaluation, for `gankit diagnose`; the first line is of true samples
    provenance.json where values come from whose names carry a provenance
    metrics.jsonl   metrics, every --eval-every steps; the first line (step null) is the true data's own score
    samples/        reals.png, fakes-000500.png, ...; of 2-D data .npz, too, for the report
    curves.png      losses and metrics (with gankit[plot])
    summary.json    how it ended
    checkpoints/    step-000500/{generator,discriminator,...}.safetensors and state.pt; links latest and best
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from gankit.errors import UsageError
from gankit.files import naming, step_of, write_atomic

CHECKPOINT = re.compile(r"step-(\d+)")
FAKES = re.compile(r"fakes-\d+\.(png|npz)")


def to_json(value: Any) -> str:
    """JSON for people; not-a-number and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=2) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value


def _parsed(lines: bytes) -> list[dict[str, Any]]:
    found = []
    for line in lines.splitlines():
        with suppress(ValueError):  # of bytes that are no text, too
            found.append(json.loads(line))
    return found


class RunDir:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self._read: dict[str, tuple[int, list[dict[str, Any]]]] = {}  # by .jsonl file: how many bytes, and their rows

    @classmethod
    def create(cls, out: Path, name: str | None, label: str) -> RunDir:
        """A new folder ``out/name``, or ``out/<next number>-<label>``. An existing ``name`` is refused."""
        out.mkdir(parents=True, exist_ok=True)
        if name is None:
            taken = [int(match[1]) for child in out.iterdir() if (match := re.match(r"(\d{5,})-", child.name))]
            number = max(taken, default=-1) + 1
            while True:
                path = out / f"{number:05d}-{re.sub(r'[^A-Za-z0-9_.+-]+', '-', label)}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:  # another run took the number just now
                    number += 1
        else:
            path = out / name
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                raise UsageError(f"{path} exists: choose another --name, or continue it with gankit resume") from None
        run = cls(path)
        run.samples.mkdir()
        run.checkpoints.mkdir()
        return run

    @classmethod
    def find(cls, given: str | None, out: str = "runs") -> RunDir:
        """The run at path ``given``, or the one under ``out`` whose name or number it is; None: the newest."""
        if given and (Path(given) / "config.toml").is_file():
            return cls(Path(given))
        root = Path(out)
        runs = sorted(path.parent for path in root.glob("[!.]*/config.toml"))
        if given is None and runs:
            return cls(max(runs, key=lambda path: (path / "config.toml").stat().st_mtime))
        number = f"{int(given):05d}-" if given and given.isdecimal() else None
        matches = [p for p in runs if p.name == given or (number and p.name.startswith(number))]
        if given is None or not matches:
            listed = ", ".join(p.name for p in runs[-5:]) or "none"
            raise UsageError(f"no run {given or ''} found; runs under {out}: {listed}")
        return cls(matches[-1])

    def remove(self) -> None:
        """Delete the folder: a run that never began leaves nothing."""
        shutil.rmtree(self.path, ignore_errors=True)

    # -- records -------------------------------------------------------------------------------------------------

    def write_json(self, name: str, value: Any) -> None:
        """One JSON file, complete or absent."""
        write_atomic(self.path / name, to_json(value))

    def read_json(self, name: str) -> Any:
        """One JSON file of the run; UsageError if it is missing or broken."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"{self.path / name} cannot be read: {error}") from None

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """One line of a .jsonl file, handed to the operating system at once."""
        with naming(self.path / name), (self.path / name).open("a") as file:
            file.write(json.dumps(_finite(row)) + "\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The complete lines of a .jsonl file; a line cut off by a kill is left out. What was read before is remembered."""
        path = self.path / name
        if not path.exists():
            return []
        size, found = self._read.get(name, (0, []))
        with path.open("rb") as file:
            file.seek(size)
            new = file.read()
        whole = new.rfind(b"\n") + 1
        found = found + _parsed(new[:whole])
        self._read[name] = size + whole, found
        return found + _parsed(new[whole:])

    def trim(self, step: int) -> None:
        """Forget what was recorded after ``step``, for a run that continues from there, and what a kill left unfinished."""
        for name in ("stats.jsonl", "metrics.jsonl", "signals.jsonl"):
            kept = [row for row in self.rows(name) if (row["step"] or 0) <= step]
            write_atomic(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))
            self._read.pop(name, None)
        for picture in self.samples.glob("fakes-*.*"):
            if FAKES.fullmatch(picture.name) and step_of(picture) > step:
                picture.unlink()
        for torn in self.checkpoints.glob(".step-*"):
            shutil.rmtree(torn, ignore_errors=True)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], step: int) -> Path:
        """A checkpoint: complete under its name, or absent. ``latest`` points to it afterwards."""
        final = self.checkpoints / f"step-{step:06d}"
        temporary = self.checkpoints / f".{final.name}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            for name, tensors in weights.items():
                separate = {key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}
                write_atomic(temporary / f"{name}.safetensors", safetensors.torch.save(separate))
            buffer = io.BytesIO()  # serialised in memory first, so that a full disk is an OSError like any other
            torch.save(state, buffer)
            write_atomic(temporary / "state.pt", buffer.getvalue())
            _sync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
            _sync(self.checkpoints)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.link("latest", final)
        return final

    def link(self, name: str, target: Path) -> None:
        """Point ``checkpoints/<name>`` to a checkpoint beside it."""
        temporary = self.checkpoints / f".{name}.part"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        temporary.replace(self.checkpoints / name)

    def link_best(self, step: int) -> None:
        """Point ``best`` to the checkpoint of a step, if it is there: a kill may have come between it and its link."""
        if (best := self.checkpoints / f"step-{step:06d}").exists():
            self.link("best", best)

    def prune(self, keep: int) -> None:
        """Delete all but the ``keep`` latest checkpoints and the best; under its name, each is whole or gone."""
        protected = {os.path.realpath(self.checkpoints / name) for name in ("latest", "best")}
        for old in self.steps()[:-keep]:
            if os.path.realpath(old) not in protected:
                torn = old.with_name(f".{old.name}.old")
                shutil.rmtree(torn, ignore_errors=True)
                old.replace(torn)
                shutil.rmtree(torn)

    def steps(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted((p for p in self.checkpoints.glob("*") if CHECKPOINT.fullmatch(p.name)), key=step_of)

    def fakes(self) -> list[Path]:
        """The pictures of what G makes, oldest first."""
        return sorted((p for p in self.samples.glob("*.png") if FAKES.fullmatch(p.name)), key=step_of)

    def checkpoint(self, which: str | None = None) -> Path:
        """The folder of the checkpoint called "latest" or "best" or of a step; None: the best if there is one."""
        found = self.steps()[-1:]  # not by the link: a kill between rename and relink leaves it one behind
        if which != "latest":
            name = f"step-{int(which):06d}" if which and which.isdecimal() else which or "best"
            chosen = [p for p in [self.checkpoints / name] if p.exists()]
            found = chosen if which or chosen else found
        if not found:
            listed = ", ".join(p.name for p in self.steps()) or "none"
            raise UsageError(f"{self.path} has no checkpoint {which or 'latest'!r}; it has {listed}")
        return found[0].resolve()

    @staticmethod
    def load_weights(checkpoint: Path, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """The state dicts of the named networks."""
        return {name: safetensors.torch.load_file(checkpoint / f"{name}.safetensors") for name in names}

    @staticmethod
    def load_state(checkpoint: Path, mmap: bool = False) -> dict[str, Any]:
        """Everything else; loads nothing but tensors and plain containers. mmap: tensors are read when they are used."""
        state: dict[str, Any] = torch.load(checkpoint / "state.pt", weights_only=True, map_location="cpu", mmap=mmap)
        return state


class Elsewhere(RunDir):
    """The folder of a run that process 0 writes: here, whatever would change it does nothing."""

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    write_json = append = trim = save = link = link_best = prune = _nothing  # type: ignore[assignment]


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
