"""The conformance suite: every broken plugin is caught by the check meant for it and by no other; the right ones pass."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unittest
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import pytest
import torch
from broken import Plugin, all_broken
from broken.claimed import WhereItErrs
from broken.declared import SlopeOfTheBatch
from broken.effects import AsksForValues
from click.testing import CliRunner
from conformance import IN_TREE, SKIPPED, caught_by_its_own, failures, results
from gankit_gradient_penalty import GradientPenalty
from torch import Tensor, nn

from gankit import GAN, Batch, Player, UsageError, View, hookimpl, metrics
from gankit.claims import Claims
from gankit.cli import main
from gankit.conformance import AFTER, CHECKS, checks_of, mend_of, rule_of
from gankit.conformance.bench import global_random
from gankit.conformance.surroundings import BUILT_IN
from gankit.functional import logit_per_sample, squared_gradient_norm
from gankit.plugins import CORE_NAMES
from gankit.testing import plugin_checks

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plugins" / "testing.md"
BROKEN = all_broken()
WHOLE = BROKEN[::24]  # through the whole suite; `python tests/conformance.py` takes all of them through it
ELSEWHERE = ("companions",)  # test_pairs.py trains every plugin of this repository with every other


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: f"{cls.caught_by}-{cls.__name__}")
def test_a_broken_plugin_is_caught_by_the_check_meant_for_it(cls: type[Plugin]) -> None:
    (line,) = failures(cls, (cls.caught_by,)).values()
    assert re.fullmatch(rf"FAILED  {cls.caught_by}: .{{15,}} -- .{{15,}}", line), line
    assert "the check stopped" not in line


@pytest.mark.parametrize("cls", WHOLE, ids=lambda cls: cls.__name__)
def test_a_broken_plugin_is_caught_by_no_other(cls: type[Plugin]) -> None:
    assert not caught_by_its_own(cls)


def test_every_check_has_a_broken_plugin() -> None:
    assert {check.__name__ for check in CHECKS} == {cls.caught_by for cls in BROKEN}


@pytest.mark.parametrize("name", IN_TREE)
def test_plugins_of_this_repository_pass(name: str) -> None:
    found = results(name, tuple(check.__name__ for check in CHECKS if check.__name__ not in ELSEWHERE))
    assert [str(result) for result in found if result.status == "failed"] == []
    assert {result.check for result in found if result.status == "skipped"} == SKIPPED[name]


def test_checks_say_what_must_hold_and_how_to_mend_it() -> None:
    assert len({check.__name__ for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert rule_of(check).endswith(".") and len(mend_of(check)) > 10, check.__name__
    order = [*CHECKS]
    for check, first in AFTER.items():
        assert all(order.index(one) < order.index(check) for one in first if one is not check), check.__name__


def test_the_page_lists_all_checks() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [(c.__name__, rule_of(c).replace("``", "`"), mend_of(c)) for c in CHECKS]


# -- the ways in -------------------------------------------------------------------------------------------------------

MINE = """
from dataclasses import dataclass
from typing import ClassVar
from gankit import hookimpl


@dataclass(eq=False)
class Mine:
    \"\"\"Keeps logits small.\"\"\"

    formula: ClassVar[str] = "mean D(x)^2"
    paper: ClassVar[str] = "none"

    @hookimpl
    def pre_d_loss(self, real_logits):
        return {NAME: real_logits.square().mean()}
"""


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["check", *arguments])
    return result.exit_code, result.output


def test_the_command_prints_a_line_per_check_and_exits_with_1_if_one_fails(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace("NAME", '"mine"'))
    code, output = call(f"{file}:Mine", "--only", "names", "--only", "derivative", "--only", "players")
    lines = output.splitlines()
    assert code == 0 and lines[:2] == ["ok      names", "ok      derivative"]
    assert lines[2].startswith("skipped players: it brings no networks") and lines[3].endswith(
        "2 ok, 0 failed, 1 skipped"
    )
    file.write_text(MINE.replace("NAME", '"loss"'))
    code, output = call(f"{file}:Mine", "--only", "names")
    assert code == 1 and "FAILED  names: the D term 'loss' does not begin with the plugin's name, 'mine' -- " in output


@pytest.mark.parametrize("name", CORE_NAMES)
def test_no_plugin_has_a_name_of_the_core(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace("NAME", repr(name)).replace("class Mine", f"class {name.title()}"))
    code, output = call(f"{file}:{name.title()}", "--only", "names")
    assert code == 1 and f"FAILED  names: {name!r} is a name of the core -- choose another name" in output


def test_checks_have_their_own_number_of_threads_whoever_calls_them() -> None:
    before, seen = torch.get_num_threads(), []

    class Mine(Plugin):
        @hookimpl
        def post_step(self) -> None:
            seen.append(torch.get_num_threads())

    try:
        torch.set_num_threads(3)
        (check,) = checks_of(Mine, {}, ["same_seed"])
        assert check.result().status == "ok"
        assert {*seen} == {1, 2} and torch.get_num_threads() == 3  # two while switches_kept looks on
    finally:
        torch.set_num_threads(before)


def test_json_is_a_list_of_what_was_found() -> None:
    code, output = call("r1", "--only", "names", "--only", "plain_state", "--json")
    assert code == 0
    assert json.loads(output) == [
        {"check": "names", "status": "ok", "what": "", "mend": ""},
        {"check": "plain_state", "status": "skipped", "what": "it has no state_dict", "mend": ""},
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "no plugin called 'nope'"),
        (["./nowhere.py:Mine"], "is no file"),
        (["r1", "-o", "wait=3"], "no option 'wait' (did you mean 'weight'?)"),
        (["r1", "-o", "weight=-3"], "weight must not be negative"),
        (["r1", "-o", "weight"], "-o takes name=value"),
        (["r1", "--only", "derivativ"], "did you mean 'derivative'?"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(arguments: list[str], message: str) -> None:
    code, output = call(*arguments)
    assert code == 2 and message in output and len(output.splitlines()) == 1


def test_pytest_gets_named_checks_that_raise_and_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {str(check): check for check in plugin_checks(AsksForValues)}
    assert list(found) == [check.__name__ for check in CHECKS]
    found["names"]()
    with pytest.raises(
        AssertionError, match="FAILED  no_waiting: pre_d_loss on vectors: waits for the device: .* -- keep"
    ):
        found["no_waiting"]()
    with pytest.raises(pytest.skip.Exception, match="plain_state: it has no state_dict"):
        found["plain_state"]()
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with pytest.raises(unittest.SkipTest, match="plain_state: it has no state_dict"):
        found["plain_state"]()


def test_pytest_says_which_check_was_skipped_and_where_it_was_called(tmp_path: Path) -> None:
    file = tmp_path / "test_mine.py"
    file.write_text(
        "from gankit.testing import plugin_checks\n\n"
        'state, norms = (c for c in plugin_checks("ttur") if str(c) in ("plain_state", "claimed_norm"))\n\n\n'
        "def test_state():\n    state()\n\n\ndef test_norms():\n    norms()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(file)]
    output = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
    lines = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    assert lines == [
        "SKIPPED [1] test_mine.py:7: plain_state: it has no state_dict",
        "SKIPPED [1] test_mine.py:11: claimed_norm: its claims do not give gradient_norm",
    ]


@pytest.mark.parametrize("option", ["center=0", "gradient_penalty.center=0"])
def test_an_option_may_name_its_plugin(option: str, tmp_path: Path) -> None:
    assert call("gradient_penalty", "--only", "claimed_norm", "-o", option)[0] == 0
    file = tmp_path / "mine.py"
    file.write_text(MINE.replace("NAME", '"mine"').replace("    @hookimpl", "    center: float = 1.0\n\n    @hookimpl"))
    option = option.replace("gradient_penalty", "mine")
    assert call(f"{file}:Mine", "--only", "names", "-o", option)[0] == 0


def test_logits_of_all_shapes_reach_the_plugin() -> None:
    shapes = set()

    class Sees(Plugin):
        """It notes which logits it is given."""

        @hookimpl
        def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
            shapes.add(tuple(real_logits.shape))
            return self.term(real_logits.square().mean())

    (check,) = checks_of(Sees, only=["logit_shapes"])
    assert check.result().status == "ok"
    assert {(8,), (8, 1), (8, 1, 1, 1), (8, 1, 2, 2)} <= shapes


def test_a_slope_of_the_batch_is_told_from_one_of_the_view() -> None:
    (line,) = failures(SlopeOfTheBatch, ("three_steps",)).values()
    assert "with respect to `view.real` and `view.fake`" in line


def test_a_loop_of_ones_own_tells_of_each_update_once() -> None:
    updates = []

    class Sees(Plugin):
        """It notes which updates it is told of."""

        @hookimpl
        def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
            return self.term(real_logits.square().mean())

        @hookimpl
        def post_step(self, phase: str, step: int) -> None:
            updates.append((phase, step))

    (check,) = checks_of(Sees, only=["own_loop"])
    check.bench.data = ("vector",)
    check.bench.records()
    updates.clear()
    assert check.function(check.bench) is None
    assert updates == 4 * [(phase, step) for step in (1, 2, 3) for phase in "dg"]  # three ways, and gankit's own loop


@pytest.mark.parametrize("name", ["NeedsTheAdversarialLoss", "RateOfTheRun"])
def test_own_loop_says_in_which_of_them(name: str) -> None:
    cls = next(cls for cls in BROKEN if cls.__name__ == name)
    (line,) = failures(cls, ("own_loop",)).values()
    if name == "RateOfTheRun":
        assert (
            "with d_loss and g_loss of gankit.attach, on vectors, in step 1: the D term 'rate_of_the_run' is " in line
        )
    else:
        assert "d_terms and g_terms of what it shows, of gankit.attach, on vectors: KeyError: 'adv'" in line


def test_own_loop_tells_of_a_run_that_ends_early() -> None:
    class EndsTheRun(AsksForValues):
        """Says that training is done, which a loop of one's own need not ask."""

        @hookimpl
        def post_step(self, gan: GAN, phase: str, step: int) -> None:
            gan.stop = step == 2 and phase == "g"

    (line,) = failures(EndsTheRun, ("own_loop",)).values()
    assert "6 updates with" in line and "on vectors, 4 in gankit's own loop: it stops one of the two" in line


def test_late_terms_are_looked_at() -> None:
    class Late(AsksForValues):
        """From step 1000 on."""

        @hookimpl
        def pre_d_loss(self, real_logits: Tensor, step: int) -> dict[str, Tensor] | None:
            return super().pre_d_loss(real_logits) if step > 1000 else None

    class AtTheEnd(Late):
        """In the last tenth."""

        @hookimpl
        def pre_d_loss(self, gan: GAN, real_logits: Tensor, step: int) -> dict[str, Tensor] | None:
            return super().pre_d_loss(real_logits, step) if step > 0.9 * gan.steps else None

    for cls in (Late, AtTheEnd):
        assert failures(cls, ("no_waiting", "terms_seen", "derivative")).keys() == {"no_waiting"}


def test_a_term_that_comes_with_another_loss_alone_is_seen() -> None:
    checks = checks_of("progressive", only=["terms_seen"])
    assert str(checks[0].result()).endswith(
        "not with the loss non_saturating, with which most is checked, but with wasserstein"
    )


def test_options_reach_the_plugin() -> None:
    assert not failures("gradient_penalty", ("claimed_norm",), center=0.0, weight=3.0)
    assert not failures("gradient_penalty", ("claimed_norm",), one_sided=True)

    class TwoSided(GradientPenalty):
        """Says nothing of its option."""

        claims = replace(
            GradientPenalty.claims, gradient_norm=lambda self, norm: self.weight * (norm - self.center) ** 2
        )

    assert not failures(TwoSided, ("claimed_norm",))
    assert "claimed_norm" in failures(TwoSided, ("claimed_norm",), one_sided=True)


def test_a_check_that_is_waived_says_why() -> None:
    class Waived(AsksForValues):
        """The same, on purpose."""

        claims = Claims(waives={"no_waiting": "it has to know"})

    (check,) = checks_of(Waived, only=["no_waiting"])
    assert str(check.result()) == "skipped no_waiting: waived: it has to know"
    (check,) = checks_of(AsksForValues, only=["no_waiting"])
    assert check.result().status == "failed"


# -- no false alarms ---------------------------------------------------------------------------------------------------


class Legitimate(Plugin):
    """What looks like slips and is none: numbers made on the CPU, a copy of D, a lasting average on its own network."""

    @hookimpl
    def setup(self, gan: GAN) -> None:
        with gan.initialising(self):
            self.judge = nn.Linear(1, 1).to(gan.device)

    @hookimpl
    def pre_d_loss(self, gan: GAN, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        scale = torch.tensor(0.5, dtype=real_logits.dtype)  # a single number mixes with every device
        noise = torch.rand(
            len(real_logits), generator=gan.rng(self), device=real_logits.device, dtype=real_logits.dtype
        )
        steep = squared_gradient_norm(real_logits, view.real).mean()
        return self.term(scale * steep + torch.where(noise > 0.5, noise, -noise).mean() * real_logits.square().mean())


@dataclass(eq=False)
class LazyWithState(Plugin):
    """Near its running average, in every fourth step, four times as strong; the average moves whenever it acts."""

    every: Annotated[int, "apply in every k-th step, k times as strong"] = 4

    def __post_init__(self) -> None:
        self.average, self.seen = torch.zeros(()), None

    @hookimpl
    def post_g_loss(self, batch: Batch, step: int) -> dict[str, Tensor] | None:
        self.seen = None
        if step % self.every:
            return None
        mean = batch.fake.mean()
        self.seen = mean.detach()
        return self.term(self.every * (mean - self.average.to(mean)).square())

    @hookimpl
    def post_step(self, phase: str) -> None:
        if phase == "g" and self.seen is not None:
            self.average, self.seen = self.average.to(self.seen).lerp(self.seen, 0.5), None

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average = state["average"]


class AlikeInTheMean(Plugin):
    """Seldom, much, and to one side: but with the same chances for both sides, which are also drawn one from the other."""

    @hookimpl(wrapper=True)
    def view(self, gan: GAN) -> Generator[None, View, View]:
        view = yield
        (real, *others), (fake, *fake_others) = view
        u = torch.empty_like(real).uniform_(generator=gan.rng(self))
        real, fake = (x + 100 * (v > 0.99) + v.mean() for x, v in ((real, u), (fake, 1 - u)))
        return View((real, *others), (fake, *fake_others))


class OnceOnTheCPU(Plugin):
    """Made there and brought over, or only named beside it."""

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        x = logit_per_sample(real_logits)
        ones = torch.ones(len(x), dtype=x.dtype, device=torch.device("cpu")).to(x.device)
        places = torch.linspace(0, 1, len(x)).to(x)
        listed = torch.as_tensor([1.0] * len(x), dtype=x.dtype, device=x.device)
        same = torch.as_tensor(x)
        filled = torch.empty_like(x)
        filled.copy_(torch.arange(len(x)))
        return self.term((ones * places * listed * same * filled).mean())


@dataclass(eq=False)
class KeptOnTheCPU(Plugin):
    """Made before there is a device: brought over by itself, by the core, in ``setup``, or what comes is brought to it."""

    def __post_init__(self) -> None:
        self.target, self.shift, self.histogram = torch.ones(1), torch.ones(1), torch.zeros(4)
        self.judge = nn.BatchNorm1d(1)
        self.past: deque[Tensor] = deque(maxlen=4)

    @hookimpl
    def players(self) -> dict[str, Player]:
        return {"judge": Player(nn.Sequential(nn.Linear(1, 1), self.judge), "d")}

    @hookimpl
    def setup(self, gan: GAN) -> None:
        self.shift = self.shift.to(gan.device)

    @hookimpl
    def pre_d_loss(self, gan: GAN, real_logits: Tensor) -> dict[str, Tensor]:
        x = logit_per_sample(real_logits)
        self.past.append(x.detach().mean())
        judged = gan.players["judge"].module.eval()(x[:, None])
        gan.players["judge"].module.train()
        return self.term(((x - self.target.to(x)) * self.shift.to(x.dtype) * judged).mean())

    @hookimpl
    def post_step(self, phase: str, step: int) -> None:
        if phase == "g" and step % 2 == 0:
            self.histogram += torch.stack([*self.past]).cpu().histc(4)


@dataclass(eq=False)
class LogsInEveryStep(Plugin):
    """It does so because the bench asks for ``every=1``; by default it seldom waits."""

    every: Annotated[int, "log in every k-th step"] = 50

    @hookimpl
    def post_step(self, terms: dict[str, Tensor], step: int) -> None:
        if step % self.every == 0:
            self.last = {name: term.item() for name, term in terms.items()}


def test_no_false_alarm_of_sides_and_devices() -> None:
    assert not failures(AlikeInTheMean, ("view_sides_alike",))
    assert not failures(OnceOnTheCPU, ("any_device", "float64", "own_loop"))
    assert not failures(KeptOnTheCPU, ("any_device", "no_waiting", "no_graph_kept", "no_leak"))


def test_no_false_alarm_of_a_log() -> None:
    assert not failures(LogsInEveryStep, ("no_waiting",))
    assert failures(LogsInEveryStep, ("no_waiting",), every=1).keys() == {"no_waiting"}


def test_all_metrics_of_gankits_own_are_known() -> None:
    half, points = torch.tensor([0.5, 0.5]), torch.zeros(2, 2)
    found = metrics.share_metrics(torch.tensor([3, 1]), 4, half) | metrics.mode_metrics(points, points, 1.0)
    assert found.keys() | metrics.label_modes(torch.zeros(2, 1).long()).keys() <= {*BUILT_IN}


def test_unusual_but_right() -> None:
    assert not failures(LazyWithState)
    assert not failures(Legitimate)
    assert not failures(WhereItErrs)


class VectorsOnly(Plugin):
    """It refuses images in a sentence."""

    @hookimpl
    def setup(self, gan: GAN) -> None:
        if len(gan.shape) != 1:
            raise UsageError("vectors only: leave it out")

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())


def test_one_kind_may_be_refused_not_both() -> None:
    VectorsOnly.data = ("vector", "image")
    assert not failures(VectorsOnly)
    (check,) = checks_of(VectorsOnly, only=["three_steps"])
    assert str(check.result()).startswith("ok      three_steps: on vectors alone, for images are refused: vectors only")
    VectorsOnly.data = ("image",)
    assert failures(VectorsOnly).keys() == {"three_steps"}


class WassersteinOnly(Plugin):
    """It refuses all losses but one."""

    @hookimpl
    def setup(self, gan: GAN) -> None:
        if gan.loss.name != "wasserstein":
            raise UsageError("for the wasserstein loss only")

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(squared_gradient_norm(real_logits, view.real).mean())


def test_a_loss_is_found_that_is_not_refused() -> None:
    assert not failures(WassersteinOnly)


def test_the_suite_leaves_global_generators_alone() -> None:
    state = torch.get_rng_state()
    failures("gradient_penalty", ("three_steps", "global_random", "resumes"))
    assert torch.equal(state, torch.get_rng_state())
    with global_random(3):
        inside = torch.rand(2)
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(inside, torch.rand(2))
