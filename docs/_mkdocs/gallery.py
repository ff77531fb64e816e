"""The plugin gallery: a page for each folder of plugins/, made when the site is built and nowhere else.

Formula, paper and options are those of the plugin's class, text and measured rows those of its README, what it combines
with is read from docs/compatibility.md, and its functions are mkdocstrings'. Links are written as seen from the plugin's
folder; links.py leads them to pages.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from gankit.config import RECIPES, Config
from gankit.options import Option, options_of, type_name
from gankit.plugins import find

ROOT = Path(__file__).parents[2]
PANELS = "docs/assets/ring"
OTHERS = "Others"
OPTIONS = re.compile(r"(?:^(## Options\n(?:(?!## ).*\n)*?))?^\|\s*option.*\n(?:\|.*\n)*", re.MULTILINE)
MEASURED = re.compile(r"<!-- measured row -->\n(.*?)\n<!-- end -->", re.DOTALL)


@dataclass(frozen=True)
class Plugin:
    """What the gallery knows of a plugin."""

    name: str
    module: str
    group: str
    factory: type
    readme: str

    @property
    def formula(self) -> str:
        """One line, as `gankit plugins show` prints it."""
        return str(self.factory.formula)  # type: ignore[attr-defined]

    @property
    def looks_on(self) -> bool:
        """Whether it regularizes and measures nothing, as a logger: then there is no formula and nothing to compare."""
        return self.formula.startswith("none")

    @property
    def paper(self) -> str:
        """The papers with links to them."""
        return re.sub(
            r"arXiv:(\d{4}\.\d{4,5})",
            r"[arXiv:\1](https://arxiv.org/abs/\1)",
            str(self.factory.paper),  # type: ignore[attr-defined]
        )

    @property
    def summary(self) -> str:
        """The first line of the class's docstring."""
        return re.sub(r":\w+:(?=`)", "", (self.factory.__doc__ or "").strip().split("\n")[0])

    @property
    def options(self) -> dict[str, Option]:
        """Its options by name."""
        return options_of(self.factory)

    @property
    def hooks(self) -> list[str]:
        """The hooks it implements, in the order in which a step calls them."""
        from gankit.hookspecs import NAMES

        return [name for name in NAMES if hasattr(getattr(self.factory, name, None), "gankit_impl")]


@functools.cache
def plugins() -> dict[str, Plugin]:
    """All plugins of the repository by name, in the order of the README's table."""
    table = groups()
    found = {}
    for manifest in ROOT.glob("plugins/*/pyproject.toml"):
        (points,) = [tomllib.loads(manifest.read_text())["project"]["entry-points"]["gankit"]]
        ((name, target),) = points.items()
        folder = manifest.parent
        found[folder.name] = Plugin(
            folder.name,
            target.split(":")[0],
            table.get(folder.name, OTHERS),
            find(name).factory,
            (folder / "README.md").read_text(),
        )
    order = [*table, *sorted(found)]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def groups() -> dict[str, str]:
    """What each plugin is for, from the table "What is here" of the README."""
    rows = re.findall(r"^\| ([^|]+) \| (.*\]\(plugins/.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return {
        name: group[0].upper() + group[1:] for group, text in rows for name in re.findall(r"\]\(plugins/(\w+)\)", text)
    }


def by_group() -> dict[str, list[Plugin]]:
    """The plugins under what they are for."""
    found: dict[str, list[Plugin]] = {}
    for plugin in plugins().values():
        found.setdefault(plugin.group, []).append(plugin)
    return found


# --- What mkdocs calls ---


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the plugins into the navigation, and the pages of a folder in the place of the folder."""
    pages = {group: [{p.name: f"gallery/{p.name}.md"} for p in members] for group, members in by_group().items()}
    config.nav = [expanded(entry, Path(config.docs_dir)) for entry in config.nav or []]
    for entry in config.nav:
        if "Plugins" in entry:
            entry["Plugins"][1:1] = [{group: members} for group, members in pages.items()]
    return config


def expanded(entry: Any, docs: Path) -> Any:
    """A navigation entry with the pages of a folder, its index first, in the place of a folder such as "decisions/"."""
    if isinstance(entry, dict):
        return {title: expanded(value, docs) for title, value in entry.items()}
    if isinstance(entry, list):
        return [page for value in entry for page in as_list(expanded(value, docs))]
    if not entry.endswith("/"):
        return entry
    paths = sorted((docs / entry).glob("*.md"), key=lambda path: (path.stem not in ("index", "README"), path.name))
    return [path.relative_to(docs).as_posix() for path in paths]


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as the only one."""
    return value if isinstance(value, list) else [value]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the gallery."""
    files.append(File.generated(config, "gallery/index.md", content=index_page()))
    for plugin in plugins().values():
        files.append(File.generated(config, f"gallery/{plugin.name}.md", content=plugin_page(plugin)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the pictures of the ring where the start page wants them, and the tables of settings on their page."""
    for mark, made in {r"<!-- ring -->": ring, r"<!-- settings: .*? -->": settings}.items():
        markdown = re.sub(mark, lambda match, made=made: made(), markdown)
    return markdown


# --- Pages ---


def index_page() -> str:
    """All plugins as cards, by what they are for; links as seen from plugins/."""
    parts = [
        "# Plugins",
        "Each is a pure function for any PyTorch loop, a plugin for `gankit run` and `gankit.attach`, or both. Pictures and "
        "figures are of the ring and the grid: modes found and high quality, mean of five seeds; without a plugin they are "
        f"{figures('none')}. The picture is seed 0.",
    ]
    for group, members in by_group().items():
        parts += [f"## {group}", '<div class="cards" markdown>', *map(card, members), "</div>"]
    return "\n\n".join(parts) + "\n"


def card(plugin: Plugin) -> str:
    """One plugin of the index."""
    panel = f"{PANELS}/{plugin.name}.png"
    picture = f"![Samples on the ring with {plugin.name}](../{panel}){{ .panel loading=lazy }}"
    parts = [
        picture if (ROOT / panel).exists() else "",
        f"**[{plugin.name}]({plugin.name})**",
        plugin.summary,
        "" if plugin.looks_on else code(plugin.formula),
        "" if plugin.looks_on else (figures(plugin.name) or "Measured on images: see its page") + "\n{ .figures }",
    ]
    body = "\n\n".join(filter(None, parts))
    return f'<div class="card" markdown>\n\n{body}\n\n</div>'


def plugin_page(plugin: Plugin) -> str:
    """README, options, combinations and functions of one plugin; links as seen from its folder."""
    lead, body = reshaped(plugin)
    hooks = ", ".join(f"[`{name}`](../../docs/plugins/hooks/{name}.md)" for name in plugin.hooks)
    facts = {
        "Paper": "" if plugin.looks_on else plugin.paper,
        "For": plugin.group,
        "Hooks": hooks,
        "Package": f"`{plugin.module.replace('_', '-')}`",
    }
    parts = [
        f"# {plugin.name}",
        lead,
        '<div class="facts" markdown>',
        *(f"{term}\n:   {text}" for term, text in facts.items() if text),
        "</div>",
        body,
        "## Tested combinations",
        combinations(plugin.name),
        "## API",
        f"::: {plugin.module}\n    options:\n      heading_level: 3",
    ]
    return "\n\n".join(parts) + "\n"


def reshaped(plugin: Plugin) -> tuple[str, str]:
    """What a README says first, and the rest of it under one heading per subject.

    READMEs are short: where one of them starts a subject in bold letters, or with a block of code alone, the page has a
    heading. The table of options is replaced by the options themselves. PluginError for a README that lacks a subject.
    """
    text = plugin.readme.split("\n", 1)[1]
    text = MEASURED.sub(r"## Measured\n\n\1", text)
    text, tables = OPTIONS.subn(lambda match: f"{match[1] or '## Options'}\n\n{options(plugin)}\n", text)
    text = re.sub(
        r"\n\n\*\*([A-Z][^*\n]+)\.\*\*\s+(\S)", lambda match: f"\n\n## {match[1]}\n\n{match[2].upper()}", text
    )
    text = re.sub(r"^In your own loop(?:, ([^:]*))?:$", own_loop, text, flags=re.MULTILINE)
    text = re.sub(r"^(?=    pip install )", "## Install and run\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"^## [^\n]+\n+(?=## )", "", text, flags=re.MULTILINE)  # nothing is left under it
    lead, body = re.split(r"\n\n(?=```\n|    |## )", text, maxsplit=1)
    needed = ["Cost"] if plugin.looks_on else ["Measured", "Cost"]
    missing = [] if "Use it" in lead else ['when to use it ("Use it ...", above the formula)']
    missing += ["Options"] if plugin.options and not tables else []
    missing += [title for title in needed if f"\n## {title}" not in body]
    if missing:
        raise PluginError(f"plugins/{plugin.name}/README.md does not say: {', '.join(missing)}")
    return lead.strip(), ("" if plugin.looks_on else "## Formula\n\n") + body.strip()


def own_loop(match: re.Match[str]) -> str:
    """A heading for "In your own loop, with X:", and what is left of the line."""
    return "## In your own loop" + (f"\n\n{match[1][0].upper()}{match[1][1:]}:" if match[1] else "")


def options(plugin: Plugin) -> str:
    """A plugin's options as a table."""
    if not plugin.options:
        return "None."
    rows = [
        f"| `{name}` | {type_name(option.annotation).replace('|', ', ')} | {default(option.default)} | {cell(option.help)} |"
        for name, option in plugin.options.items()
    ]
    return "\n".join(["| option | type | default | |", "|---|---|---|---|", *rows, ""])


def default(value: object) -> str:
    """A default as it would be typed on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{','.join(map(str, value)) if isinstance(value, tuple | list) else value}`"


def combinations(name: str) -> str:
    """With which plugins this one was tested, from docs/compatibility.md."""
    if name not in tested():
        return "Not in [the table](../../docs/compatibility.md) yet."
    both: list[str] = []
    images: list[str] = []
    refused: dict[str, str] = {}
    for other in tested():
        if other == name:
            continue
        pairs = [(name, other), (other, name)]
        reasons = {kind: [r for pair in pairs if (r := verdicts().get((*pair, kind)))] for kind in ("v", "i")}
        if reasons["i"]:
            refused[other] = reasons["i"][0]
        else:
            (images if reasons["v"] else both).append(other)
    lines = [
        "Two steps with each other plugin, in both orders, on vectors and on images; "
        "[the whole table](../../docs/compatibility.md).\n"
    ]
    if both:
        lines.append(f"- **Vectors and images:** {linked(both)}")
    if images:
        lines.append(f"- **Images only:** {linked(images)}")
    for other, reason in refused.items():
        lines.append(f"- **Refused:** {linked([other])}: {cell(reason)}")
    return "\n".join(lines)


def linked(names: Iterable[str]) -> str:
    """Plugins with links to their pages, as seen from another one's folder."""
    return ", ".join(f"[{name}](../{name})" for name in names)


@functools.cache
def tested() -> list[str]:
    """The plugins in docs/compatibility.md."""
    return re.findall(r"^\| \*\*(\w+)\*\*", (ROOT / "docs" / "compatibility.md").read_text(), re.MULTILINE)


@functools.cache
def verdicts() -> dict[tuple[str, str, str], str]:
    """Why a pair (row, column, kind of data) is refused; those that are not are left out."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    reasons = {number: text.split("; ")[0] for number, text in re.findall(r"^(\d+)\. (.*)$", page, re.MULTILINE)}
    header, *rows = [line.strip("|\n ").split("|") for line in re.findall(r"^\|.*\|$", page, re.MULTILINE)]
    columns = [column.strip() for column in header if column.strip()]
    found = {}
    for row in rows[1:]:
        first, *cells = [text.strip() for text in row]
        for column, text in zip(columns, cells, strict=False):
            marks = re.fullmatch(r"v (\S+) i (\S+)", text)
            for kind, mark in zip("vi", marks.groups() if marks else (text, text), strict=True):
                if mark in reasons:
                    found[first.strip("*"), column, kind] = reasons[mark]
    return found


def settings() -> str:
    """Every setting of a run by section: flag, default or the recipes' values, meaning."""
    from gankit.cli import SECTIONS

    known = options_of(Config)
    parts = []
    for section, names in SECTIONS.items():
        parts.append(f"## {section.capitalize()}\n\n| flag | default | |\n|---|---|---|")
        for name in names:
            recipes = [f"{kind} `{recipe[name]}`" for kind, recipe in RECIPES.items() if name in recipe]
            text, _, stated = known[name].help.removesuffix("]").partition("  [")
            unset = known[name].default in (None, ())
            usual = ", ".join(recipes) or stated or ("none" if unset else default(known[name].default))
            parts[-1] += f"\n| `--{name.replace('_', '-')}` | {usual} | {cell(text)} |"
    return "\n\n".join(parts)


# --- Pictures and measured figures ---


def ring() -> str:
    """The pictures of the ring, one figure a plugin, with the numbers of the very run and of all seeds."""
    rows = {row["plugin"]: row for row in json.loads((ROOT / PANELS / "ring.json").read_text())}
    names = ["none", *(name for name in plugins() if name in rows)]
    names.insert(names.index("r2") + 1, "r1+r2")
    figures = []
    for name in names:
        row, link = rows[name], f"[{name}](../plugins/{name})"
        title = {"none": "no plugin", "r1+r2": "[r1 + r2](recipes/r3gan.md)"}.get(name, link)
        modes, quality = means(name, "ring") or (0.0, 0.0)
        figures.append(
            f"<figure markdown>\n![Samples on the ring: {name}](assets/ring/{name}.png){{ .panel loading=lazy }}\n"
            f"<figcaption markdown>\n**{title}**<br>{row['modes']:.0f} modes, {row['high_quality']:.1%}<br>"
            f"<small>5 seeds: {modes:.1f}, {quality:.1%}</small>\n</figcaption>\n</figure>"
        )
    return '<div class="ring" markdown>\n' + "\n".join(figures) + "\n</div>"


def figures(name: str) -> str:
    """Modes and high quality on ring and grid, means of all seeds, in one line; empty where there are none."""
    found = []
    for data, of in (("ring", 8), ("grid", 25)):
        if measured := means(name, data):
            found.append(f"{data} {measured[0]:.1f} of {of}, {measured[1]:.1%}")
    return "; ".join(found)


@functools.cache
def means(name: str, data: str) -> tuple[float, float] | None:
    """Mean modes and high quality of a plugin's first five seeds in tests/benchmarks/outcomes.json."""
    rows = json.loads((ROOT / "tests" / "benchmarks" / "outcomes.json").read_text())
    rows = [
        row for row in rows if (row["plugin"], row["data"]) == (name, data) and row["seed"] < 5 and "failed" not in row
    ]
    if not rows:
        return None
    return statistics.mean(row["modes"] for row in rows), statistics.mean(row["high_quality"] for row in rows)


def code(text: str) -> str:
    """Text as code within a line, whatever is in it."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def cell(text: str) -> str:
    """Plain text within Markdown."""
    return re.sub(r"([\\*_<|\[\]])", r"\\\1", text)
