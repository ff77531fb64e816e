"""A publishable plugin project from a name: ``gankit new-plugin``. Free of torch."""

from __future__ import annotations

import json
import keyword
import re
import shutil
import tempfile
from datetime import date
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from string import Template

from gankit import __version__
from gankit.errors import UsageError
from gankit.plugins import CORE_NAMES

KINDS = {  # kind: what the README states as formula until the author writes their own
    "d-term": "weight * mean_i ||grad D(x_i)||_2^2",
    "g-term": "-weight * mean_f var_i G(z_i)_f",
    "view": "D is shown x + std * noise and G(z) + std * noise",
    "setup": "W <- gain * Q, Q orthogonal",
    "evaluate": "mean_f std_i G(z_i)_f",
}
LICENSES = ("MIT", "BSD-3-Clause", "Apache-2.0")
_RUN = "from gankit.testing import plugin_checks"
_IMPORTS = {  # of the tests
    "d-term": f"import gankit\nimport pytest\nimport torch\nfrom gankit import UsageError\n{_RUN}\nfrom torch import nn",
    "g-term": f"import numpy as np\nimport pytest\nimport torch\n{_RUN}",
    "view": f"import pytest\nimport torch\n{_RUN}",
    "setup": f"import pytest\nimport torch\nfrom gankit import UsageError\n{_RUN}, tiny_gan\nfrom torch import nn",
    "evaluate": f"import numpy as np\nimport pytest\nimport torch\n{_RUN}",
}


def render(name: str, kind: str, *, license: str = "MIT", author: str = "") -> dict[str, str]:
    """The files of the project, text by path.

    name: of the plugin, "my_penalty" or "my-penalty". kind: which hook it starts from, one of `KINDS`. license: SPDX name,
    one of `LICENSES`. author: one line. Raises UsageError for what is none of these, and for a name that the core or an
    installed plugin has.
    """
    name = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", name) or keyword.iskeyword(name):
        raise UsageError(f"a plugin's name is lower case, such as my_penalty, not {name!r}")
    for what, value, choices in (("kind", kind, tuple(KINDS)), ("license", license, LICENSES)):
        if value not in choices:
            raise UsageError(f"there is no {what} {value!r}: choose from {', '.join(choices)}")
    if name in CORE_NAMES:
        raise UsageError(f"{name!r} is a name of the core: choose another name")
    if not author.isprintable():
        raise UsageError(f"an author is one line of text, not {author!r}")
    for taken in entry_points(group="gankit", name=name):
        raise UsageError(f"a plugin called {name!r} is installed already ({taken.value}): choose another name")
    author = author or "TODO your name"
    cls = "".join(part.capitalize() for part in name.split("_"))
    major, minor = (int(part) for part in __version__.split(".")[:2])
    known = {
        "name": name, "module": f"gankit_{name}", "cls": cls, "distribution": f"gankit-{name.replace('_', '-')}",
        "title": name.replace("_", " ").capitalize(), "formula": KINDS[kind], "license": license,
        "author": author, "quoted_author": json.dumps(author, ensure_ascii=False), "year": str(date.today().year),
        "test_imports": _IMPORTS[kind],
        "names": f"{cls}, {name}_penalty" if kind == "d-term" else f"{cls}, {name}",
        "minor": f"{major}.{minor}", "next": f"{major}.{minor + 1}",
    }  # fmt: skip
    for part in ("readme", "test"):
        known[part] = Template(_template(f"{kind}.{part}")).substitute(known).rstrip()
    homes = {
        "pyproject.toml": "pyproject.toml", "README.md": "README.md", f"gankit_{name}.py": f"{kind}.py",
        f"tests/test_{name}.py": "test.py", ".github/workflows/tests.yml": "workflow.yml", ".gitignore": "gitignore",
        "LICENSE": f"LICENSE.{license}",
    }  # fmt: skip
    return {path: Template(_template(home)).safe_substitute(known) for path, home in homes.items()}


def write(project: dict[str, str], folder: Path) -> list[Path]:
    """Write the files under a folder that does not exist yet, complete or not at all, and return their paths."""
    if folder.exists():
        raise UsageError(f"{folder} exists already: choose another name, or --to another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        for path, text in project.items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_text(text, encoding="utf-8")
        shutil.move(made, folder)
    return [folder / path for path in project]


def _template(name: str) -> str:
    return (files("gankit") / "template" / f"{name}.txt").read_text()
