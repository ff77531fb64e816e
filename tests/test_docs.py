"""Every code block of README.md, docs/ and the plugins' READMEs is executed; nothing is skipped without saying so.

How a page is read, block after block, in an empty folder:

- ``python`` runs, in one namespace per page. If its first line is ``# mine.py``, it is written to that file as well. It
  may fail if the next block is the error.
- ``text`` is what the block before it printed, warned of or raised, and "..." in it stands for anything.
- ``sh`` runs, line by line. ``console`` too: its commands begin with "$ ", the other lines are what they say.
  ``gankit`` trains for a few steps; data that are not here are stand-ins; see ``Reader.shell``.
- ``toml`` is a run's configuration, or with ``# folder/pyproject.toml`` in its first line a part of that file.
- A file of the page's own folder is there from the start, for commands that stand above it.
- ``diff`` belongs to tests/test_existing_loops.py, which compares it with the files.
- Four spaces, or a fence without a language: commands, if the first word is one, which are tried without training; else a
  formula. Commands in a sentence are tried, too, as far as they go.
- Any other block is an error, unless ``<!-- not executed: why -->`` stands in the line above.
"""

import contextlib
import importlib.util
import io
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flit_core import buildapi
from packaging.requirements import Requirement
from PIL import Image
from rich.console import Console

import gankit
from gankit import run as running
from gankit.cli import main, read_settings
from gankit.config import make, read_toml
from gankit.hookspecs import NAMES
from gankit.options import options_of
from gankit.plugins import create, find
from gankit.terminal import Terminal
from gankit.testing import tiny_gan, write_digits

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")])
IN_TREE = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
NOT_EXECUTED = 2  # blocks that say why they are not: uploading the tutorial's package, torchrun

COMMANDS = ("gankit", "pip", "make", "python")
MORE = {  # options that are added, so that what trains trains shortly
    "run": ["--steps", "3", "--eval-samples", "50", "--eval-every", "0", "--save-every", "0", "--threads", "1",
            "--no-report"],
    "resume": ["--steps", "4", "--no-report"],
    "bench": ["--dry-run"],
}  # fmt: skip
IN_WORDS = {  # defaults that a plugin's page describes: by option, the cell and the value behind it
    ("inception", "metrics"): ("all", ("inception_score", "fid", "kid", "precision", "recall", "modes")),
    ("self_attention", "resolution"): ("half the image, at most 32", None),
    ("stacked", "noise"): ("a quarter", None),
    ("stacked", "small_loss"): ("the run's", None),
    ("tensorboard", "folder"): ("the run's", None),
    ("ttur", "lr_d"): ("preset's", None),
    ("ttur", "lr_g"): ("preset's", None),
    ("ttur", "beta1"): ("preset's", None),
    ("ttur", "beta2"): ("preset's", None),
    ("unrolled", "lr"): ("D's", None),
    ("virtual_batch_norm", "reference"): ("the batch size", None),
}
PLACEHOLDERS = {"S": "0", "X": "ring", "NAME": "r1", "FILE.toml": "settings.toml"}
LARGE = ("stacked-mnist",)  # data that would take seconds to make: settings and plugins are read, no network is built


class Block(NamedTuple):
    """A piece of code on a page: its language ("" where four spaces mark it), its text, and why it is not executed."""

    language: str
    text: str
    line: int
    why_not: str


def blocks(text: str) -> list[Block]:
    """All blocks of a page, fenced or behind four spaces, in order."""
    pattern = r"^(?:<!-- not executed: ([^\n]+) -->\n)?```(\w*)\n(.*?)^```$|(?<=\n\n)((?: {4}[^\n]+\n)+)"
    found = []
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        why_not, language, fenced, behind = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(language or "", fenced if behind is None else behind, line, why_not or ""))
    return found


def name_of(block: Block) -> str:
    """The file that a block's first line says it is, or nothing."""
    named = re.match(r"# ([\w./-]+\.(?:py|toml))\n", block.text)
    return named[1] if named and block.language in ("python", "toml") else ""


def in_line(text: str) -> list[str]:
    """Commands in a page's sentences."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(rf"`((?:{'|'.join(COMMANDS)}) [^`]+)`", prose)]


def lines_of(text: str) -> list[str]:
    """Shell lines, continued ones joined, without comments."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def matches(expected: str, actual: str) -> bool:
    """Whether a text is the expected one up to white space; "..." stands for anything."""
    pattern = r".*?".join(re.escape(" ".join(part.split())) for part in expected.split("..."))
    return (
        re.fullmatch(pattern.replace(r"\ .*?", r".*?").replace(r".*?\ ", r".*?"), " ".join(actual.split())) is not None
    )


class Reader:
    """Reads one page and does what it says, in the current folder."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.module = ModuleType("page")
        self.said = ""
        self.folder = Path.cwd()
        self.site = self.folder / "site"
        self.projects: list[Path] = []
        self.site.mkdir()
        monkeypatch.setitem(sys.modules, "page", self.module)  # dataclasses look there for a class's module
        for path in (self.folder, self.site):
            monkeypatch.syspath_prepend(path)

    def read(self, text: str, name: str) -> None:
        """Execute all blocks of a page in order, then try the commands in its sentences. name: of the page, for errors."""
        everything = blocks(text)
        for block in reversed(everything):  # the first version of a file, for commands that stand above it
            if name_of(block) and "/" not in name_of(block):
                Path(name_of(block)).write_text(block.text)
        for block, after in zip(everything, [*everything[1:], None], strict=False):
            expected = after.text if after and after.language == "text" else None
            try:
                if not block.why_not:
                    self.execute(block, expected)
            except Exception as error:
                error.add_note(f"in {name}, line {block.line}")
                raise
        for line in in_line(text):
            self.shell(line, "mention")

    def execute(self, block: Block, expected: str | None) -> None:
        """Do what a block says; expected: what is known to be said."""
        match block.language:
            case "python":
                if name_of(block):
                    path = Path(name_of(block))
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(block.text)
                self.python(block, expected)
            case "text":
                assert self.said, "nothing was said before this"
                assert matches(block.text, self.said), f"expected:\n{block.text}\nsaid:\n{self.said}"
            case "sh":
                for line in lines_of(block.text):
                    self.shell(line, "train")
            case "console":
                self.console(block.text)
            case "toml":
                self.toml(block)
            case "diff":
                assert "test_existing_loops" not in block.text  # compared there, line by line
            case "" if " ".join(lines_of(block.text)).partition(" ")[0] in COMMANDS:
                for line in lines_of(block.text):
                    self.shell(line, "try")
            case "":
                code = rf"^ *(?:[$>%] |(?:{'|'.join(COMMANDS)}|import|from|def|class|cp|cd) )"
                assert not re.search(code, block.text, re.MULTILINE), "this is code: say in which language"
            case _:
                raise AssertionError(f"a block of the language {block.language!r} is not executed: say why, above it")

    def python(self, block: Block, expected: str | None) -> None:
        """Run a block; what it prints, warns of and raises is what it says."""
        code = compile("\n" * block.line + block.text, "<page>", "exec")
        said = io.StringIO()
        with warnings.catch_warnings(record=True) as warned, contextlib.redirect_stdout(said):
            warnings.simplefilter("always")
            try:
                exec(code, self.module.__dict__)
            except Exception as error:
                if expected is None:
                    raise
                print("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
        kinds = [
            f"{w.category.__name__}: {w.message}\n"
            for w in warned
            if issubclass(w.category, (UserWarning, FutureWarning))
        ]
        self.said = "".join(kinds) + said.getvalue()

    def console(self, text: str) -> None:
        """Run the commands behind "$ " and compare what they say, if anything is written."""
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
            self.said = ""
            self.shell(command, "say" if expected.strip() else "train")
            assert not expected.strip() or matches(expected, self.said), f"$ {command}\n{self.said}"

    def toml(self, block: Block) -> None:
        """A run's configuration; or, with a name, a part of that file."""
        if name_of(block):
            there = tomllib.loads(Path(name_of(block)).read_text())
            assert not missing(tomllib.loads(block.text), there), f"{name_of(block)} has other values"
        else:
            Path("settings.toml").write_text(block.text)
            values, options = read_toml(Path("settings.toml"))
            config = make(values, options)
            create(config.plugin, config.options)

    def shell(self, line: str, how: str) -> None:
        """Run a command; how: "train" for some steps; "say", whatever its exit code; "try", not train; "mention", may lack
        what it acts on.

        ``pip`` installs nothing: what it names must be here, and a project that the page made is put where its entry points
        are found. ``make`` needs its target, and ``python`` its script.
        """
        words = shlex.split(line.replace("...", ""), comments=True)
        program, *arguments = words
        if program == "gankit":
            self.gankit(arguments, how)
        elif words[:2] == ["pip", "install"]:
            self.pip_install(arguments[1:])
        elif program == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert arguments and set(arguments) <= set(targets), line
        elif words[:3] in (["python", "-m", "pytest"], ["python", "-m", "pip"]) and how == "train":
            extra = ["--no-build-isolation", "--quiet"] if words[2:4] == ["pip", "wheel"] else []
            path = os.pathsep.join(map(str, [self.site, *self.projects]))
            env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, *arguments, *extra], env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            self.said = done.stdout
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), line
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), line
        elif program == "torchrun":
            read(arguments[arguments.index("gankit") + 1 :], "try")
        elif program == "cp":
            shutil.copyfile(*arguments)
        elif words == [".", ".venv/bin/activate"]:
            assert "VENV ?= .venv\n" in (ROOT / "Makefile").read_text()
        else:
            raise AssertionError(f"this cannot be executed, so say why above the block: {line}")

    def gankit(self, words: list[str], how: str) -> None:
        """Run a command of gankit's in this process; or only read it, and build what it would train."""
        newest = max(Path("runs").glob("[0-9]*"), default=Path("0001-ring"))
        known = {**PLACEHOLDERS, "RUN": str(newest)}
        words = [known.get(word.strip("[]"), word) for word in words]
        for before, word in itertools.pairwise(words):
            if before == "--data" and word.startswith("./") and not Path(word).exists():
                Path(word).symlink_to(Path("photos").resolve())  # somebody's own images
        if how not in ("train", "say"):
            read(words, how)
            return
        words += MORE.get(words[0], ()) if how == "train" and words and not {"--dry-run", "--help"} & set(words) else ()
        result = CliRunner().invoke(main, words)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert how == "say" or result.exit_code == 0, f"gankit {' '.join(words)}\n{result.output}"
        self.said = result.output

    def pip_install(self, words: list[str]) -> None:
        """Check what would be installed; a project of the page's own is made known to ``importlib.metadata``."""
        assert words
        core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        previous = ""
        for word in words:
            if previous == "-r":
                assert (ROOT / word).is_file(), word
            elif word.startswith((".", "/")):
                path = Path(word.partition("[")[0])
                if (self.folder / path / "pyproject.toml").is_file():
                    self.install(self.folder / path)
                else:
                    assert (ROOT / path / "pyproject.toml").is_file(), word
            elif not word.startswith("-"):
                asked = Requirement(word)
                known = [f"gankit-{name.replace('_', '-')}" for name in IN_TREE]
                outside = [Requirement(line).name for line in core["dependencies"]]
                assert asked.name in ["gankit", *known, *outside, *[p.name for p in self.projects]], word
                assert asked.extras <= set(core["optional-dependencies"]), word
            previous = word

    def install(self, project: Path) -> None:
        """What ``pip install -e`` leaves behind: the project on the path, its metadata beside."""
        with self.monkeypatch.context() as there:
            there.chdir(project)
            buildapi.prepare_metadata_for_build_wheel(str(self.site))
        self.monkeypatch.syspath_prepend(project)
        self.projects.append(project)
        importlib.invalidate_caches()


def read(words: list[str], how: str) -> None:
    """Hold a command against the real ones: their options, the settings, the plugins and theirs; build its networks."""
    name, command, rest = main.resolve_command(click.Context(main), [w for w in words if w not in ("--help", "--json")])
    while isinstance(command, click.Group) and rest:
        name, command, rest = command.resolve_command(click.Context(command), rest)
    assert command is not None
    try:
        context = command.make_context(name, list(rest))
    except (click.BadOptionUsage, click.MissingParameter):
        if how != "mention":
            raise
        if not rest:  # the command as such: "`gankit check` holds a plugin to ..."
            return
        context = command.make_context(name, rest[:-1])  # an option as such: "`gankit run --config` repeats it"
    if name not in ("run", "explain"):
        return
    others = ("dry_run", "as_json", "reported")
    config = read_settings({key: value for key, value in context.params.items() if key not in others})
    if config.data in LARGE:
        create(config.plugin, config.options)
    else:
        running.dry_run(config, Terminal(Console(file=io.StringIO())))


def missing(part: dict[str, Any], whole: dict[str, Any]) -> list[str]:
    """Keys of nested tables whose values differ from those of the whole."""
    found = []
    for key, value in part.items():
        if isinstance(value, dict):
            found += missing(value, whole.get(key, {}))
        elif whole.get(key) != value:
            found.append(key)
    return found


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data that pages speak of: MNIST's files, a folder of photos, CIFAR-10's test images."""
    folder = tmp_path_factory.mktemp("data")
    write_digits(folder / "mnist", train=300, test=100)
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    with zipfile.ZipFile(folder / "cifar10-test.zip", "w") as archive:
        for i in range(80):
            path = folder / "photos" / f"{i}.png"
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
            archive.write(path, path.name)
    return folder


@pytest.fixture
def reader(tmp_path: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """A reader in an empty folder, beside stand-ins for data, where a plugin for another gankit is installed."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GANKIT_DATA", str(stand_ins))
    for name in ("photos", "cifar10-test.zip"):  # any other folder of images is the same one
        Path(name).symlink_to(stand_ins / name)
    reader = Reader(monkeypatch)
    future = reader.site / "gankit_future-1.0.dist-info"
    future.mkdir()
    future.joinpath("METADATA").write_text(
        "Metadata-Version: 2.1\nName: gankit-future\nVersion: 1.0\nRequires-Dist: gankit>=9.0,<9.1\n"
    )
    future.joinpath("entry_points.txt").write_text("[gankit]\nfuture = gankit_future:Future\n")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield reader
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_says(page: Path, reader: Reader) -> None:
    reader.read(page.read_text(), str(page.relative_to(ROOT)))


def test_blocks_that_are_not_executed_say_why_and_are_counted() -> None:
    found = [block for page in PAGES for block in blocks(page.read_text()) if block.why_not]
    assert len(found) == NOT_EXECUTED


def test_no_fence_escapes_the_reader() -> None:
    for page in PAGES:
        text = page.read_text()
        fenced = [block for block in blocks(text) if block.language or not block.text.startswith("    ")]
        assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(fenced), page


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```python\n1 / 0\n```\n", "division by zero"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "expected"),
        ("```text\nout of nowhere\n```\n", "nothing was said"),
        ("```ruby\nputs 1\n```\n", "'ruby'"),
        ("```\nimport torch\n```\n", "in which language"),
        ("```sh\nrm -rf x\n```\n", "cannot be executed"),
        ("```sh\ngankit run --plugin r1 -o r1.wieght=1\n```\n", "did you mean 'weight'"),
        ("```sh\ngankit runn\n```\n", "did you mean 'run'"),
        ("```sh\nmake coffee\n```\n", "coffee"),
        ("```sh\npip install ./plugins/r3\n```\n", "r3"),
        ("```sh\npip install gankit-r3\n```\n", "gankit-r3"),
        ("```console\n$ gankit --version\ngankit, version 99\n```\n", "gankit --version"),
        ("```toml\nplugin = [\"r1\"]\n[options.r1]\nwieght = 1\n```\n", "did you mean 'weight'"),
        ("Text, and\n\n    gankit run --stesp 3\n", "--stesp"),
        ("A sentence with `gankit run --data X --dry-rum`.\n", "--dry-rum"),
        ("A sentence with `gankit run --plugin rr1 --config`.\n", "did you mean 'r1'"),
        ("A sentence with `python tests/nonsense.py`.\n", "nonsense"),
    ],
)  # fmt: skip
def test_a_page_that_lies_is_caught(page: str, complaint: str, reader: Reader) -> None:
    with pytest.raises((AssertionError, ArithmeticError, ValueError, click.ClickException)) as caught:
        reader.read(page, "lie.md")
    assert complaint in (
        caught.value.format_message() if isinstance(caught.value, click.ClickException) else str(caught.value)
    )


def test_relative_links_lead_somewhere() -> None:
    links = [(page, target) for page in PAGES for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())]
    assert not [
        f"{page.relative_to(ROOT)}: {target}"
        for page, target in links
        if not target.startswith("http") and not (page.parent / target).exists()
    ]


def users(hook: str) -> list[str]:
    """The plugins of this repository that implement a hook."""
    classes = {name: find(name).factory for name in IN_TREE}
    return [name for name, cls in classes.items() if hasattr(getattr(cls, hook, None), "gankit_impl")]


@pytest.mark.parametrize("hook", NAMES)
def test_the_page_of_a_hook_names_the_plugins_that_use_it(hook: str) -> None:
    links = ", ".join(f"[{name}](../../../plugins/{name}/README.md)" for name in users(hook))
    (line,) = re.findall(
        r"^Used by (.*)\.$", (ROOT / "docs" / "plugins" / "hooks" / f"{hook}.md").read_text(), re.MULTILINE
    )
    assert line == links


def test_the_directory_lists_every_plugin_of_the_repository_once() -> None:
    page = (ROOT / "docs" / "plugins" / "directory.md").read_text()
    listed = re.findall(r"^\| \[(\w+)\]\(\.\./\.\./plugins/(\w+)/README\.md\) \| \S.* \|$", page, re.MULTILINE)
    assert all(name == folder for name, folder in listed)
    assert sorted(name for name, _ in listed) == IN_TREE


def written(page: str) -> dict[str, str]:
    """The options of a plugin's page and their defaults as they stand in its table, in order."""
    (table,) = re.findall(r"^\| option \| default \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    found: dict[str, str] = {}
    for row in table.splitlines():
        _, names, defaults, _ = row.split("|", 3)
        options = re.findall(r"`(\w+)`", names)
        cells = [cell.strip().strip("`") for cell in (defaults.split(", ") if defaults.count("`") > 2 else [defaults])]
        found |= zip(options, cells * len(options) if len(cells) == 1 else cells, strict=True)
    return found


def means(cell: str, default: object) -> bool:
    """Whether a cell says that this is the default."""
    match default:
        case None:
            return cell in ("none", "")
        case bool():
            return cell in (("yes", "true") if default else ("no", "false"))
        case int() | float():
            return re.fullmatch(r"[\d.]+(e-?\d+)?", cell) is not None and float(cell) == default
        case tuple():
            return cell == ",".join(default)
        case _:
            return cell == default


@pytest.mark.parametrize("name", IN_TREE)
def test_the_page_of_a_plugin_has_its_options_and_their_defaults(name: str) -> None:
    cells = written((ROOT / "plugins" / name / "README.md").read_text())
    defaults = {option: known.default for option, known in options_of(find(name).factory).items()}
    assert [*cells] == [*defaults]
    for option, cell in cells.items():
        if (name, option) in IN_WORDS:
            assert (cell, defaults[option]) == IN_WORDS[name, option]
        else:
            assert means(cell, defaults[option]), f"{option}: {cell!r} is written, and {defaults[option]!r} the default"


def test_the_version_is_one() -> None:
    assert gankit.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert tiny_gan().step == 0
