"""Every Python block in the README files and in docs/ runs; every plugin in docs/hooks.md trains."""

import re
from pathlib import Path

import pytest
import torch

import gankit
from gankit.testing import run, tiny_gan
from gankit.training import measure

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")])
PRELUDE = """
import math
from collections.abc import Callable, Generator
import torch
from torch import Tensor, nn
from gankit import GAN, Batch, Player, UsageError, View, hookimpl
from gankit.functional import input_gradients
"""


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "hooks.md" and blocks(p)], ids=lambda p: p.parent.name)
def test_the_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("block", blocks(ROOT / "docs" / "hooks.md"), ids=lambda b: re.findall(r"def (\w+)", b)[0])
def test_the_examples_of_the_hooks_train(block: str) -> None:
    namespace: dict[str, object] = {}
    exec(PRELUDE + block, namespace)
    (plugin,) = [v for k, v in namespace.items() if isinstance(v, type) and f"class {k}" in block]
    gan, log = run({"example": plugin()}, steps=2)
    assert all(torch.isfinite(torch.tensor(list(terms.values()))).all() for _, _, terms in log.updates)
    if "def evaluate" in block:
        assert measure(gan)


def test_relative_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_version_is_one() -> None:
    import tomllib

    assert gankit.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert tiny_gan().step == 0
