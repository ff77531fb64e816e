"""Links that leave docs/: a plugin's folder or README leads to its page in the gallery, a file to a page that shows it.

The pages are written for readers of the repository, where links go from file to file. Here every relative link is
resolved to a file or folder of the repository first, and then to the page of the site that stands for it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?![a-z]+:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
LANGUAGES = {".py": "python", ".toml": "toml", ".txt": "text", ".md": "markdown", ".json": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file of the repository that a page links to, and that is not on the site by itself."""
    linked = {
        path
        for file in files.documentation_pages()
        for match in LINK.finditer(file.content_string)
        if (path := repository_path(file.src_uri, match["target"])) and page_of(path) == shown_at(path)
    }
    linked |= {file for path in linked for file in contents(path)}
    for path in sorted(linked):
        files.append(
            File.generated(config, shown_at(path), content=source_page(path), inclusion=InclusionLevel.NOT_IN_NAV)
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links of a page lead to pages of the site."""
    uri = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        path = repository_path(uri, match["target"])
        if path is None:  # mkdocs says that it leads nowhere
            return match[0]
        return f"]({os.path.relpath(page_of(path), PurePosixPath(uri).parent)}{match['anchor'] or ''})"

    return LINK.sub(moved, markdown)


def repository_path(uri: str, target: str) -> str | None:
    """The file or folder that ``target`` on page ``uri`` means, from the root of the repository; None if there is none."""
    path = os.path.normpath(origin(uri) / target)
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def origin(uri: str) -> PurePosixPath:
    """The folder of the repository that the text of a page comes from."""
    parts = PurePosixPath(uri)
    if uri.startswith("source/"):
        return PurePosixPath(uri.removeprefix("source/").removesuffix(".md"))
    if uri.startswith("gallery/"):
        return PurePosixPath("plugins") / ("" if parts.stem == "index" else parts.stem)
    return PurePosixPath("docs") / parts.parent


def page_of(path: str) -> str:
    """Where on the site a file or folder of the repository is found: the source path of a page, or of an asset."""
    parts = PurePosixPath(path)
    if path == "plugins":
        return "gallery/index.md"
    if parts.parts[0] == "plugins" and (len(parts.parts) == 2 or parts.parts[2:] == ("README.md",)):
        return f"gallery/{parts.parts[1]}.md"
    if path == "README.md":
        return "index.md"
    if parts.parts[0] == "docs" and parts.suffix not in ("", ".py", ".json"):
        return str(parts.relative_to("docs"))
    return shown_at(path)


def shown_at(path: str) -> str:
    """The page that shows a file as it is, or the names of a folder's files."""
    return f"source/{path}.md"


def contents(path: str) -> list[str]:
    """The files of a folder that can be shown; those of its folders are left out."""
    return sorted(
        f"{path}/{file.name}" for file in (ROOT / path).glob("*") if file.is_file() and file.suffix in LANGUAGES
    )


def source_page(path: str) -> str:
    """A file of the repository, or the list of a folder's files, as Markdown."""
    file = ROOT / path
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {file.name}\n\n`{path}`\n\n"
    if file.is_dir():
        return head + "".join(f"- [{name}]({name})\n" for name in map(os.path.basename, contents(path)))
    return f"{head}~~~~~~{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text()}\n~~~~~~\n"
