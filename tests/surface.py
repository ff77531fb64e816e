"""Everything of gankit that a plugin or a loop may use, one line each: for the test that keeps it from changing unnoticed.

python tests/surface.py        # writes tests/surface.txt, after a change that is meant
"""

from __future__ import annotations

import dataclasses
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import gankit
from gankit import hookspecs

FILE = Path(__file__).with_suffix(".txt")
MODULES = (
    "checks", "claims", "functional", "inversion", "joint", "losses", "metrics", "networks", "provenance", "structure",
    "testing",
)  # fmt: skip


def signature(value: Any) -> str:
    """A callable's arguments with their defaults, without annotations: names are the contract, types are documentation."""
    parameters = inspect.signature(value).parameters.values()
    plain = [p.replace(annotation=p.empty) for p in parameters if p.name != "self"]
    return str(inspect.Signature(plain))


def describe(path: str, value: Any) -> list[str]:
    """The lines of one public object."""
    if dataclasses.is_dataclass(value):
        fields = ", ".join(field.name for field in dataclasses.fields(value))
        lines = [f"{path} has {fields}"]
    elif inspect.isclass(value) and issubclass(value, tuple):
        lines = [f"{path} has {', '.join(value._fields)}"]  # type: ignore[attr-defined]
    elif inspect.isclass(value) and issubclass(value, Exception):
        return [path]
    else:
        return [f"{path}{signature(value)}"] if callable(value) else [path]
    methods = [(n, m) for n, m in vars(value).items() if inspect.isfunction(m) and not n.startswith("_")]
    return [*lines, *(f"{path}.{name}{signature(method)}" for name, method in methods)]


def surface() -> str:
    """All lines: hooks, public names, and the modules that plugins import."""
    lines = [f"hook {name}{signature(getattr(hookspecs, name))}" for name in hookspecs.NAMES]
    for name in gankit.__all__:
        lines += describe(f"gankit.{name}", getattr(gankit, name))
    for home in MODULES:
        module = import_module(f"gankit.{home}")
        for name, value in vars(module).items():
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__:
                lines += describe(f"gankit.{home}.{name}", value)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(surface())
