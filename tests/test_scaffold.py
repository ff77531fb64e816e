"""`gankit new-plugin`: every kind is a project that installs, passes its own tests, builds a wheel, and is found."""

import dataclasses
import importlib
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from click.testing import CliRunner

from gankit import UsageError
from gankit.cli import main
from gankit.options import options_of
from gankit.plugins import CORE_NAMES, find
from gankit.scaffold import KINDS, LICENSES, render, write

ROOT = Path(__file__).parents[1]
COMMANDS = """
import sys

from click.testing import CliRunner
from gankit.cli import main

names = sys.argv[1:]
runs = [["run", "--plugin", name, "--steps", "3", "--eval-samples", "50", "--no-report"] for name in names]
# the checks of all were run by their own tests; of one, by the command
for arguments, said in ((["check", names[0]], " 0 failed"), *((run, "finished") for run in runs)):
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and said in result.output, result.output
"""
WHEELS = ("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist")


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


def test_rendered_projects_are_publishable(python: Path, tmp_path: Path) -> None:
    """All kinds in one environment, so that what has to import torch does it once for all of them."""
    names = {kind: f"my_{kind.replace('-', '_')}" for kind in KINDS}
    for kind, name in names.items():
        result = CliRunner().invoke(main, ["new-plugin", name, "--kind", kind, "--to", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
    projects = [f"./{name}" for name in names.values()]
    call(python, *WHEELS, *projects, cwd=tmp_path)
    wheels = [str(path) for path in (tmp_path / "dist").glob("*.whl")]
    assert len(wheels) == len(KINDS)
    call(python, "pip", "install", "--quiet", "--no-deps", *wheels, cwd=tmp_path)
    passed = call(python, "pytest", "-q", "-rA", "--rootdir", ".", *projects, cwd=tmp_path)
    assert all(f"PASSED {name}/tests/test_{name}.py::" in passed for name in names.values()), passed
    for kind, name in names.items():
        readme = (tmp_path / name / "README.md").read_text()
        examples = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
        assert len(examples) == (1 if kind == "evaluate" else 2)
        for lint in (("check", "--select", "E,F,I,UP,B"), ("format", "--check")):
            call(python, "ruff", *lint, "--isolated", "--line-length", "120", ".", cwd=tmp_path / name)
        (tmp_path / f"example_{name}.py").write_text("\n".join(examples))
    (tmp_path / "examples.py").write_text("\n".join(f"import example_{name}" for name in names.values()))
    call(python, "examples", cwd=tmp_path)
    listed = call(python, "gankit", "plugins", cwd=tmp_path)
    assert all(name in listed for name in names.values())
    (tmp_path / "commands.py").write_text(COMMANDS)
    call(python, "commands", *names.values(), cwd=tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_readme_has_what_a_page_of_the_gallery_needs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_mkdocs"))
    gallery = importlib.import_module("gallery")
    project = render("my_plugin", kind)
    file = tmp_path / "my_plugin.py"
    file.write_text(project["gankit_my_plugin.py"])
    factory = find(f"{file}:MyPlugin").factory
    measured = project["README.md"] + "\n<!-- measured row -->\n| ring |\n<!-- end -->\n"
    plugin = gallery.Plugin("my_plugin", "gankit_my_plugin", "Others", factory, measured)
    lead, body = gallery.reshaped(plugin)
    assert "Use it" in lead
    for option in options_of(factory):
        assert f"| `{option}` |" in project["README.md"] and f"| `{option}` |" in body
    assert "\nCost: " in body and "\nLimits: " in body
    with pytest.raises(gallery.PluginError, match="does not say: Measured$"):
        gallery.reshaped(dataclasses.replace(plugin, readme=project["README.md"]))


def test_a_project_that_is_not_installed_says_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "project"
    write(render("not_installed", "g-term"), folder)
    tests = [sys.executable, "-m", "pytest", "-q", "-k", "found_under_its_name"]
    done = subprocess.run(tests, capture_output=True, text=True, cwd=folder)
    assert 'AssertionError: pip install -e ".[test]" first' in done.stdout


@pytest.mark.parametrize("license", LICENSES)
def test_the_license_is_the_one_asked_for(license: str) -> None:
    project = render("my_penalty", "d-term", license=license, author="Ada")
    first = {"MIT": "MIT License", "BSD-3-Clause": "Copyright (c)", "Apache-2.0": "Apache License"}[license]
    assert first in project["LICENSE"]
    assert f'license = "{license}"' in project["pyproject.toml"]
    assert license == "Apache-2.0" or "Ada" in project["LICENSE"]
    assert not any("$" in text.replace("${{", "") for text in project.values())


@pytest.mark.parametrize("author", ['Ada "C" L', "back\\slash", "Zoë $year", ""])
def test_whatever_an_author_is_called_the_project_is_valid(author: str, tmp_path: Path) -> None:
    write(render("my_penalty", "d-term", author=author), tmp_path / "project")
    text = {name: (tmp_path / "project" / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "LICENSE")}
    assert tomllib.loads(text["pyproject.toml"])["project"]["authors"] == [{"name": author or "TODO your name"}]
    assert f" {author or 'TODO your name'}\n" in text["LICENSE"]
    with pytest.raises(UsageError, match="an author is one line of text"):
        render("my_penalty", "d-term", author=f"{author}\nand others")


def test_names_of_the_core_are_refused() -> None:
    for name in CORE_NAMES:
        with pytest.raises(UsageError, match=f"{name!r} is a name of the core: choose another name"):
            render(name, "d-term")


def test_ci_says_where_gankit_comes_from_before_it_is_needed() -> None:
    workflow = render("my_penalty", "d-term")[".github/workflows/tests.yml"]
    assert "\nenv:\n  GANKIT: gankit #" in workflow
    steps = re.findall(r"- run: (.*)", workflow)
    assert steps.index('pip install "${{ env.GANKIT }}"') < steps.index('pip install -e ".[test]"')


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
