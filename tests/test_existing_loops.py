"""docs/existing-loops: every loop runs, gankit adds at most five lines to it, and without plugins it changes nothing.

python tests/test_existing_loops.py        # writes the diffs into docs/existing-loops/README.md
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gankit_inception import fidelity

import gankit

FOLDER = Path(__file__).parents[1] / "docs" / "existing-loops"
PAIRS = {  # with gankit: without
    "levels_function": "levels_before",
    "levels_object": "levels_before",
    "levels_attach": "levels_before",
    "plain_after": "plain_before",
    "lightning_after": "lightning_before",
    "fabric_after": "fabric_before",
    "accelerate_after": "accelerate_before",
}
NEEDS = {"lightning": "lightning", "fabric": "lightning", "accelerate": "accelerate"}  # dev extras
TERMS = {"consistency": "consistency_real"}  # not called after the plugin
MOST = 5
STEPS = 3


def difference(after: str, context: int = 0) -> list[str]:
    """The lines that differ, with + and -, and their context."""
    old, new = ((FOLDER / f"{name}.py").read_text().splitlines() for name in (PAIRS[after], after))
    lines = difflib.unified_diff(old, new, n=context, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def train(name: str) -> Callable[..., list[float]]:
    """The function ``train`` of an example, freshly loaded."""
    package = NEEDS.get(name.split("_")[0])
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; it is in requirements-dev.txt")
    fidelity()  # makes a torchvision importable that was built for another torch: Lightning imports it, too
    spec = importlib.util.spec_from_file_location(f"existing_loops_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other packages
        spec.loader.exec_module(module)
    function: Callable[..., list[float]] = module.train
    return function


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning may leave a folder
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def test_every_example_is_of_a_pair() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*PAIRS, *PAIRS.values()}


@pytest.mark.parametrize("after", PAIRS)
def test_gankit_changes_or_adds_at_most_five_lines(after: str) -> None:
    old, new = ((FOLDER / f"{name}.py").read_text().splitlines() for name in (PAIRS[after], after))
    changes = [op for op in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if op[0] != "equal"]
    assert 0 < sum(max(i2 - i1, j2 - j1) for _, i1, i2, j1, j2 in changes) <= MOST
    assert len([line for line in difference(after) if line.startswith("+")]) <= MOST


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({*PAIRS, *PAIRS.values()}))
def test_every_loop_trains(name: str) -> None:
    losses = train(name)(STEPS)
    assert len(losses) == STEPS and all(map(math.isfinite, losses))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("after", [name for name in PAIRS if "attach" in (FOLDER / f"{name}.py").read_text()])
def test_without_plugins_an_attached_loop_is_the_same_bit_for_bit_and_with_them_they_act(
    after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train(PAIRS[after])(STEPS)
    attach, found = gankit.attach, []

    def seen(G: Any, D: Any, plugins: Any, **settings: Any) -> Any:
        found.append(attach(G, D, plugins, **settings))
        return found[-1]

    monkeypatch.setattr(gankit, "attach", lambda G, D, plugins, **settings: seen(G, D, [], **settings))
    assert train(after)(STEPS) == before
    monkeypatch.setattr(gankit, "attach", seen)
    with_plugins = train(after)(STEPS)
    assert with_plugins != before
    attached = found[-1]
    for name, plugin in attached.gan.plugins.items():
        assert TERMS.get(name, name) in attached.terms["g" if name == "mode_seeking" else "d"], name
        if name == "lecam":  # it moves after the steps of the optimiser inside the framework's
            assert plugin.averages is not None
    assert attached.gan.step == STEPS


class Brings:
    """A network whose gradient is 1 in every update of G."""

    @gankit.hookimpl
    def players(self) -> dict[str, Any]:
        self.network = torch.nn.Linear(1, 1, bias=False)
        return {"brought": gankit.Player(self.network, "g")}

    @gankit.hookimpl
    def post_g_loss(self) -> dict[str, torch.Tensor]:
        return {"brought": self.network.weight.sum()}


@pytest.mark.filterwarnings("ignore")
def test_gradients_of_networks_that_plugins_bring_do_not_add_up_over_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    Adam, attach, made, brings = torch.optim.Adam, gankit.attach, [], Brings()

    def seen(*args: Any, **settings: Any) -> Any:
        made.append(Adam(*args, **settings))
        return made[-1]

    def attached(G: Any, D: Any, plugins: Any, **settings: Any) -> Any:
        return attach(G, D, [brings], optimizers=dict(zip("dg", made, strict=True)), **settings)

    monkeypatch.setattr(torch.optim, "Adam", seen)
    monkeypatch.setattr(gankit, "attach", attached)
    train("plain_after")(STEPS)
    assert brings.network.weight.grad is not None and brings.network.weight.grad.item() == 1


def test_the_loop_of_the_readme_leaves_no_gradients_of_earlier_steps() -> None:
    text = (FOLDER.parents[1] / "README.md").read_text()
    before, loop = re.findall(r"```python\n(import torch\n.*?|import gankit\n.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(before + loop, names)
    parameters = [*names["G"].parameters(), *names["D"].parameters()]
    for p in parameters:
        p.grad = torch.full_like(p, 1e6)
    exec(loop.split("z = torch.randn(32, 64)\n")[1], names)  # the steps
    assert all(p.grad.abs().max() < 1e5 for p in parameters)


@pytest.mark.filterwarnings("ignore")
def test_mixed_precision_of_accelerate() -> None:
    exact = train("accelerate_after")(STEPS)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # it allows one precision per process
    try:
        mixed = train("accelerate_after")(STEPS, "bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert mixed != exact
    assert mixed == pytest.approx(exact, rel=0.05)


@pytest.mark.filterwarnings("ignore")
def test_mixed_precision_of_fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, attach = train("fabric_after")(STEPS), gankit.attach
    with pytest.raises(RuntimeError) as caught:
        train("fabric_after")(STEPS, "bf16-mixed")
    assert any("attach(G, D.module, ...)" in note for note in caught.value.__notes__)
    monkeypatch.setattr(gankit, "attach", lambda G, D, plugins, **settings: attach(G, D.module, plugins, **settings))
    mixed = train("fabric_after")(STEPS, "bf16-mixed")
    assert mixed != exact
    assert mixed == pytest.approx(exact, rel=0.05)


def test_the_page_shows_the_differences() -> None:
    text = (FOLDER / "README.md").read_text()
    assert written(text) == text, "run python tests/test_existing_loops.py"


def written(text: str) -> str:
    """The page with fresh differences, one after each line that links the two files."""

    def block(match: re.Match[str]) -> str:
        return match[1] + "\n".join(["```diff", *difference(match[2], context=1), "```"])

    return re.sub(r"(\((\w+)\.py\)[^`(]*\(\w+\.py\):\n\n)```diff\n.*?```", block, text, flags=re.DOTALL)


def test_torch_runs_on_one_thread() -> None:
    assert torch.get_num_threads() == 1


if __name__ == "__main__":
    page = FOLDER / "README.md"
    page.write_text(written(page.read_text()))
    sys.exit(0)
