"""`gankit new-plugin`: every kind is a project that installs, passes its own tests, builds a wheel, and is found."""

import re
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
from click.testing import CliRunner

from gankit import UsageError
from gankit.cli import main
from gankit.scaffold import KINDS, LICENSES, render, write

SETTING = """
import torch
from torch import nn

G, D = nn.Linear(4, 2), nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
real, z = torch.randn(6, 2), torch.randn(6, 4)
fake = G(z)
d_loss, g_loss = D(fake.detach()).mean() - D(real).mean(), -D(fake).mean()
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment that sees the packages of this one: torch is too big to install again."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    site.joinpath("outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return folder / "bin" / "python"


def call(python: Path, *arguments: str, cwd: Path) -> str:
    done = subprocess.run([str(python), "-m", *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_rendered_project_is_publishable(kind: str, python: Path, tmp_path: Path) -> None:
    name = f"my_{kind.replace('-', '_')}"
    result = CliRunner().invoke(main, ["new-plugin", name, "--kind", kind, "--to", str(tmp_path / "project")])
    assert result.exit_code == 0, result.output
    project = tmp_path / "project"
    wheels = ("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", ".")
    call(python, *wheels, cwd=project)
    (wheel,) = (project / "dist").glob("*.whl")
    call(python, "pip", "install", "--quiet", "--no-deps", str(wheel), cwd=project)
    assert " passed" in call(python, "pytest", "-q", cwd=project)
    call(python, "ruff", "check", "--isolated", "--select", "E,F,I,UP,B", "--line-length", "120", ".", cwd=project)
    call(python, "ruff", "format", "--isolated", "--line-length", "120", "--check", ".", cwd=project)
    (example,) = re.findall(r"^```python\n(.*?)^```", (project / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (project / "example.py").write_text(SETTING + example)
    call(python, "example", cwd=project)
    assert name in call(python, "gankit", "plugins", cwd=tmp_path)
    assert " 0 failed" in call(python, "gankit", "check", name, cwd=tmp_path)
    assert "finished" in call(
        python, "gankit", "run", "--plugin", name, "--steps", "3", "--eval-samples", "50", cwd=tmp_path
    )


@pytest.mark.parametrize("license", LICENSES)
def test_the_license_is_the_one_asked_for(license: str) -> None:
    project = render("my_penalty", "d-term", license=license, author="Ada")
    first = {"MIT": "MIT License", "BSD-3-Clause": "Copyright (c)", "Apache-2.0": "Apache License"}[license]
    assert first in project["LICENSE"]
    assert f'license = "{license}"' in project["pyproject.toml"]
    assert license == "Apache-2.0" or "Ada" in project["LICENSE"]
    assert not any("$" in text.replace("${{", "") for text in project.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MyPenalty", "d-term"), "lower case"),
        (("class", "d-term"), "lower case"),
        (("my_penalty", "h-term"), "no kind 'h-term'"),
        (("r1", "d-term"), "installed already"),
    ],
)
def test_what_cannot_be_rendered_is_one_sentence(arguments: tuple[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        render(*arguments)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        write(render("my_penalty", "view"), tmp_path / "there")
    assert not list((tmp_path / "there").iterdir())
