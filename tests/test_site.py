"""The documentation site: it builds strictly, asks no other host for anything, and has a page for every plugin."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

from gankit.cli import main

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
ASSETS = ROOT / "docs" / "assets" / "ring"
REMOTE = re.compile(r"^\s*(https?:)?//")


class Html(HTMLParser):
    """What a page links to, what it loads, its headings and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self._collecting: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given["href"])
        self.loads += [given[key] for key in ("src", "srcset", "data", "poster") if given.get(key)]
        self.loads += re.findall(r"url\(['\"]?([^)'\"]+)", given.get("style", ""))
        if re.fullmatch(r"h[1-6]|td", tag):
            self._collecting = self.cells if tag == "td" else self.headings
            self._collecting.append("")

    def handle_endtag(self, tag: str) -> None:
        if re.fullmatch(r"h[1-6]|td", tag):
            self._collecting = []

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._collecting:
            self._collecting[-1] += data.removesuffix("¶")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if built := os.environ.get("GANKIT_SITE"):  # `make test` has just built it
        assert (ROOT / built / "index.html").is_file(), f"there is no site in {built}"
        return ROOT / built
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Html]:
    return {path.relative_to(site).as_posix(): Html(path.read_text()) for path in sorted(site.rglob("*.html"))}


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs" / "_mkdocs"))
    try:
        return importlib.import_module("gallery")
    finally:
        sys.path.pop(0)


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[str, Html]) -> None:
    for name, page in pages.items():
        assert page.loads, name
        assert not [load for load in page.loads if REMOTE.match(load)], name
    for sheet in site.rglob("*.css"):
        found = re.findall(r"(?:@import\s+|url\()\s*['\"]?([^)'\";\s]+)", sheet.read_text())
        assert not [load for load in found if REMOTE.match(load)], sheet.name
    # The theme's script knows two files of another host. It fetches one for diagrams and one for browsers of before 2020.
    scripts = "".join(path.read_text() for path in site.rglob("*.js"))
    fetched = set(re.findall(r"\w\(['\"`](https?://[^'\"`]+)['\"`]\)", scripts))
    assert all("mermaid" in url or "resize-observer-polyfill" in url for url in fetched), fetched
    assert not any("mermaid" in (site / name).read_text() for name in pages)


def test_every_link_within_the_site_leads_somewhere(site: Path, pages: dict[str, Html]) -> None:
    for name, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link) or name == "404.html":  # whose links start at the root of a server
                continue
            target, _, anchor = unquote(link).partition("#")
            path = os.path.normpath(Path(name).parent / target) if target else name
            assert (site / path).is_file(), f"{name}: {link}"
            if anchor and path.endswith(".html"):
                assert anchor in pages[path].ids, f"{name}: {link}"


def test_links_out_of_docs_lead_to_pages(site: Path, pages: dict[str, Html]) -> None:
    def links(name: str) -> list[str]:
        """Those of the text, without the navigation."""
        return Html((site / name).read_text().partition("<article")[2].partition("</article")[0]).links

    assert "ring.py" in pages["source/tests/benchmarks/ring.py.html"].headings
    assert {"source/tests/benchmarks/ring.py.html", "gallery/index.html"} <= set(links("index.html"))
    assert "../source/docs/existing-loops/plain_after.py.html" in links("existing-loops/index.html")
    assert "../recipes/r3gan.html" in links("gallery/r1.html")  # in its README ../../docs/recipes/r3gan.md
    assert "../gallery/r1.html" in links("plugins/directory.html")  # ../../plugins/r1/README.md


def test_there_is_a_page_for_every_plugin_and_no_other(pages: dict[str, Html], gallery: ModuleType) -> None:
    found = {Path(name).stem for name in pages if name.startswith("gallery/")}
    assert found == {*PLUGINS, "index"}
    groups = {name: plugin.group for name, plugin in gallery.plugins().items()}
    missing = [name for name, group in groups.items() if group == gallery.OTHERS]
    assert not missing, f"give them a row in the README's table of what is here: {missing}"


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugins_page_says_what_a_user_needs(name: str, pages: dict[str, Html], gallery: ModuleType) -> None:
    page, plugin = pages[f"gallery/{name}.html"], gallery.plugins()[name]
    needed = {"Options", "Tested combinations", "API"} | (set() if plugin.looks_on else {"Formula", "Measured"})
    assert needed <= set(page.headings)
    assert any(heading.startswith("Cost") for heading in page.headings)
    assert "Use it" in page.text
    papers = re.findall(r"\d{4}\.\d{4,5}", plugin.factory.paper)
    assert papers or plugin.looks_on
    assert {f"https://arxiv.org/abs/{paper}" for paper in papers} <= set(page.links)
    for field in (field for field in dataclasses.fields(plugin.factory) if field.init):
        assert field.name in page.cells
    source = ast.parse((ROOT / "plugins" / name / f"gankit_{name}.py").read_text())
    public = [node.name for node in source.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    assert {f"gankit_{name}.{function}" for function in public} <= page.ids
    assert "<!--" not in page.text
    assert "**" not in page.text.split("Tested combinations")[0].replace("**vars", "").replace("**known", "")
    assert plugin.looks_on or " ".join(plugin.factory.formula.split()) in pages["gallery/index.html"].text


@pytest.mark.parametrize(
    ("pattern", "lost"),
    [("Use it", "when to use it"), ("## Cost", "Cost"), ("<!-- measured row -->", "Measured"), ("| option", "Options")],
)
def test_a_readme_without_a_part_stops_the_build(pattern: str, lost: str, gallery: ModuleType) -> None:
    from mkdocs.exceptions import PluginError

    plugin = gallery.plugins()["r1"]
    assert pattern in plugin.readme
    shortened = dataclasses.replace(plugin, readme=plugin.readme.replace(pattern, "Also", 1))
    with pytest.raises(PluginError, match=f"plugins/r1/README.md does not say: {lost}"):
        gallery.reshaped(shortened)


def test_combinations_are_those_of_the_table(gallery: ModuleType) -> None:
    lines = gallery.combinations("bigan").splitlines()
    kinds = {line.split("**")[1]: line for line in lines if line.startswith("- ") and "Refused" not in line}
    assert "[r1](../r1)" in kinds["Vectors and images:"]
    assert "[diffaugment](../diffaugment)" in kinds["Images only:"]
    assert any("Refused" in line and "[pairwise_gp]" in line and "'encoder'" in line for line in lines)
    # refused in one order is refused: the command line's order is no contract of a user
    assert ("veegan", "weight_clipping", "v") in gallery.verdicts()
    assert ("r1", "r2", "i") not in gallery.verdicts()
    table = (ROOT / "docs" / "compatibility.md").read_text().split("\n| |")[1].split("\n")[0]
    for name in (names := table.strip("| ").split(" | ")):
        told = re.findall(r"\]\(\.\./(\w+)\)", gallery.combinations(name))
        assert sorted(told) == sorted(set(names) - {name})


def test_the_pictures_of_the_ring_are_the_measured_runs(pages: dict[str, Html]) -> None:
    pictured = json.loads((ASSETS / "ring.json").read_text())
    measured = json.loads((ROOT / "tests" / "benchmarks" / "outcomes.json").read_text())
    measured = {row["plugin"]: row for row in measured if row["data"] == "ring" and row["seed"] == 0}
    assert {row["plugin"] for row in pictured} == set(measured) - {"none_slow"}
    for row in pictured:
        same = measured[row["plugin"]]
        assert row["flags"] == same["flags"], f"python tests/benchmarks/ring.py: {row['plugin']}"
        assert row["modes"] == same["modes"]
        assert row["high_quality"] == pytest.approx(same["high_quality"], abs=0.01)
        assert f"{row['modes']:.0f} modes, {row['high_quality']:.1%}" in pages["index.html"].text
        assert f"assets/ring/{row['plugin']}.png" in map(unquote, pages["index.html"].loads)
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 300_000


def test_the_page_of_settings_has_each_flag_with_its_default(gallery: ModuleType) -> None:
    rows = dict(re.findall(r"^\| `(--[a-z0-9-]+)` \| (.*?) \| .+ \|$", gallery.settings(), re.MULTILINE))
    flags = {option for param in main.commands["run"].params for option in param.opts if option.startswith("--")}  # type: ignore[attr-defined]
    assert flags - rows.keys() == {"--set", "--config", "--dry-run", "--report", "--json"}
    assert rows["--save-every"] == rows["--eval-every"] == "a tenth of the steps"
    assert rows["--lr-d"] == "plane `0.003`, vector `0.0005`, image `0.0005`"
    assert (rows["--data"], rows["--image-size"], rows["--keep"]) == ("`ring`", "none", "`2`")
