"""Finding and loading plugins; what may be imported by whom."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from gankit import UsageError, plugins
from gankit.plugins import available, create, find

ROOT = Path(__file__).parents[1]
IN_TREE = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
MINE = """
from dataclasses import dataclass
from gankit import hookimpl

@dataclass(eq=False)
class MyTerm:
    weight: float = 1.0

    @hookimpl
    def pre_d_loss(self, real_logits):
        return {"mine": self.weight * real_logits.square().mean()}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_every_plugin_of_this_repository_is_installed_and_found_by_entry_point() -> None:
    assert set(IN_TREE) <= set(available())
    for name in IN_TREE:
        source = find(name)
        assert source.factory.__module__ == f"gankit_{name}"
        assert source.distribution.replace("_", "-") == f"gankit-{name.replace('_', '-')}"
        assert source.factory.formula
        assert source.factory.paper
        assert source.factory.__doc__


def test_distributions_move_in_lockstep_and_the_development_requirements_name_them_all() -> None:
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    major, minor, _ = core["version"].split(".")
    assert {f"gankit-{name.replace('_', '-')}" for name in IN_TREE} < set(core["optional-dependencies"]["all"])
    requirements = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert {f"./plugins/{name}" for name in IN_TREE} == {
        line.removeprefix("-e ") for line in requirements if line.startswith("-e ./plugins/")
    }
    for name in IN_TREE:
        project = tomllib.loads((ROOT / "plugins" / name / "pyproject.toml").read_text())["project"]
        assert project["version"] == core["version"]
        assert f"gankit>={major}.{minor},<{major}.{int(minor) + 1}" in project["dependencies"]
        assert (ROOT / "plugins" / name / "README.md").stat().st_size > 500


def test_a_plugin_in_a_file(mine: Path) -> None:
    made, (source,) = create([f"{mine}:MyTerm"], {"my_term": {"weight": "2"}})
    assert made["my_term"].weight == 2.0  # type: ignore[attr-defined]
    assert source.name == "my_term"
    version = source.version
    mine.write_text(MINE + "\n# changed")
    assert find(f"{mine}:MyTerm").version != version  # a run is not continued with another plugin


def test_code_in_a_file_is_what_the_file_says_also_after_an_edit_of_the_same_length_and_second(mine: Path) -> None:
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(mine)], check=True)  # Python's own cache of it
    assert create([f"{mine}:MyTerm"], {})[0]["my_term"].weight == 1.0  # type: ignore[attr-defined]
    written = mine.stat().st_mtime_ns
    mine.write_text(MINE.replace("1.0", "2.0"))
    os.utime(mine, ns=(written, written))
    assert create([f"{mine}:MyTerm"], {})[0]["my_term"].weight == 2.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        (["pairwise_pg"], {}, "did you mean 'pairwise_gp'"),
        (["bigan", "bigan"], {}, "named twice"),
        (["bigan"], {"bigna": {"x": 1}}, "'bigna' .did you mean 'bigan'"),
        (
            ["gradient_penalty"],
            {"gradient_penalty": {"wieght": 1}},
            "no option 'wieght' .did you mean 'weight'",
        ),
        (["gradient_penalty"], {"gradient_penalty": {"weight": "much"}}, "must be number, not 'much'"),
        (["gradient_penalty"], {"gradient_penalty": {"every": 0}}, "every must be at least 1"),
        (["nowhere.py:Mine"], {}, "is no file"),
        (["no_such_module:Mine"], {}, "cannot import"),
        (["math:pi"], {}, "must be a class"),
        (["math:pie"], {}, "has no 'pie' .did you mean 'pi'"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(specs: list[str], options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create(specs, options)


def test_a_broken_file_and_a_name_claimed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nonsense_module")
    with pytest.raises(UsageError, match="nonsense_module"):
        find(f"{broken}:X")
    twice = [EntryPoint("p", "one:A", "gankit"), EntryPoint("p", "two:B", "gankit")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: twice)
    with pytest.raises(UsageError, match="claimed by"):
        find("p")


@pytest.mark.parametrize(("asks", "fits"), [(">=0.1,<0.2", True), (">=7,<8", False), ("", True)])
def test_a_plugin_for_other_versions_of_gankit_is_refused(
    asks: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "stranger-2.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: stranger\nVersion: 2.0\nRequires-Dist: gankit{asks}\nRequires-Dist: numpy>99\n"
    )
    info.joinpath("entry_points.txt").write_text("[gankit]\nstranger = stranger_module:Stranger\n")
    tmp_path.joinpath("stranger_module.py").write_text("class Stranger:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    if fits:
        assert find("stranger").distribution == "stranger"
        return
    with pytest.raises(UsageError, match=r"'stranger' \(stranger 2.0\) is made for gankit <8,>=7, and this is 0\.1\.0"):
        find("stranger")


def test_help_and_the_list_of_plugins_never_import_torch() -> None:
    code = """
import sys
from click.testing import CliRunner
from gankit.cli import main
import gankit
for arguments in (["--help"], ["run", "--help"], ["plugins"], ["plugins", "--json"]):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
print([name for name in ("torch", "numpy", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ALLOWED = {  # module: what of gankit it may import while it is imported
    "errors": set(), "options": {"errors"}, "config": {"errors", "options"}, "hookspecs": set(),
    "plugins": {"__version__", "hookspecs", "errors", "files", "options"}, "functional": set(),
    "losses": {"errors", "options"}, "networks": {"errors", "options"}, "metrics": {"errors"}, "contract": set(),
    "defaults": {"contract", "hookspecs"},
    "distributed": {"errors", "hookspecs"},
    "gan": {"losses", "networks", "contract", "defaults", "distributed", "errors", "plugins", "structure"},
    "structure": {"errors", "options"},
    "loop": {"contract", "gan"},
    "joint": {"networks", "contract", "errors", "hookspecs", "structure"}, "files": {"errors"},
    "pictures": {"errors", "files"},
}  # fmt: skip


def _imports(path: Path) -> set[str]:
    """Modules of gankit imported at the top of a file, those for type checking only left out."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gankit":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("module", ALLOWED)
def test_import_rules(module: str) -> None:
    assert _imports(ROOT / "gankit" / f"{module}.py") <= ALLOWED[module]


PUBLIC = ("checks", "claims", "classifier", "data", "functional", "gan", "inversion", "joint", "losses", "metrics",
          "networks", "pictures", "plugins", "provenance", "structure")  # fmt: skip


@pytest.mark.parametrize("name", IN_TREE)
def test_plugins_import_public_names_only_and_never_each_other(name: str) -> None:
    import gankit

    path = ROOT / "plugins" / name / f"gankit_{name}.py"
    text = path.read_text()
    assert _imports(path) <= {*gankit.__all__, *PUBLIC}
    assert not [other for other in IN_TREE if other != name and f"gankit_{other}" in text.replace(f"gankit_{name}", "")]


def test_the_list_as_json() -> None:
    from click.testing import CliRunner

    from gankit.cli import main

    rows = json.loads(CliRunner().invoke(main, ["plugins", "--json"]).output)
    assert set(IN_TREE) <= {row["name"] for row in rows}
    assert all(row["summary"] and row["version"] for row in rows)
