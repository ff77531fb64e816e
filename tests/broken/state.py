"""What is remembered in the wrong place, at the wrong time, or for too long."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from broken import Plugin
from gankit import GAN, hookimpl


@dataclass(eq=False)
class Anchor(Plugin):
    """Draws the logits to their moving average; right, and the base of what is wrong."""

    def __post_init__(self) -> None:
        self.average: Tensor | None = None

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor] | None:
        self.seen = real_logits.detach().mean()
        return None if self.average is None else self.term((real_logits - self.average).square().mean())

    @hookimpl
    def post_step(self, phase: str) -> None:
        if phase == "d":
            self.average = self.seen if self.average is None else self.average.lerp(self.seen, 0.1)


class ForgetsOnSave(Anchor):
    """It has no state_dict."""

    caught_by: ClassVar[str] = "resumes"


class ForgetsLate(Anchor):
    """It has no state_dict, which does not matter before it has a term."""

    caught_by: ClassVar[str] = "resumes"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor, step: int) -> dict[str, Tensor] | None:
        found = super().pre_d_loss(real_logits)
        return found if step > 5 else None


class SavesObjects(Anchor):
    """A state that only Python with this code can read."""

    caught_by: ClassVar[str] = "plain_state"

    def state_dict(self) -> dict[str, Any]:
        return {"all": SimpleNamespace(average=self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["all"].average


@dataclass(eq=False)
class LearnsTooEarly(Plugin):
    """The average moves whenever somebody asks for the term."""

    caught_by: ClassVar[str] = "the_same_again"

    def __post_init__(self) -> None:
        self.average: Tensor | None = None

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        seen = real_logits.detach().mean()
        self.average = seen if self.average is None else self.average.lerp(seen, 0.1)
        return self.term((real_logits - self.average).square().mean())

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]


class LearnsTooOften(Anchor):
    """It learns after every update, also from logits that somebody asked for in between."""

    caught_by: ClassVar[str] = "another_call"

    @hookimpl
    def post_step(self) -> None:
        self.average = self.seen if self.average is None else self.average.lerp(self.seen, 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.seen = state["average"], state["seen"]


@dataclass(eq=False)
class FadesByCalls(Plugin):
    """The weight falls with every call, not with the step."""

    caught_by: ClassVar[str] = "the_same_again"

    def __post_init__(self) -> None:
        self.calls = 0

    @hookimpl
    def post_g_loss(self, fake_logits: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return self.term(fake_logits.square().mean() / self.calls)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


class SharedAverage(Plugin):
    """The average belongs to the class: the second run begins where the first ended."""

    caught_by: ClassVar[str] = "same_seed"
    total: ClassVar[list[float]] = []

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean() / (1 + len(self.total)))

    @hookimpl
    def post_step(self, phase: str) -> None:
        if phase == "d" and len(self.total) < 40:
            self.total.append(1.0)


@dataclass(eq=False)
class FromTheSystem(Plugin):
    """A random number that no seed reaches."""

    caught_by: ClassVar[str] = "same_seed"

    def __post_init__(self) -> None:
        self.target = np.random.default_rng().uniform()

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term((real_logits - self.target).square().mean())


LATEST: dict[str, Tensor] = {}


class OneForAll(Plugin):
    """A table of the module, emptied when a run begins: right until two train in turns."""

    caught_by: ClassVar[str] = "two_at_once"

    @hookimpl
    def setup(self) -> None:
        LATEST.clear()

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term((real_logits - LATEST.get("average", 0)).square().mean())

    @hookimpl
    def post_step(self, terms: dict[str, Tensor], phase: str) -> None:
        if phase == "d":
            LATEST["average"] = terms["one_for_all"]

    def state_dict(self) -> dict[str, Any]:
        return dict(LATEST)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        LATEST.update(state)


class KeepsTheGraph(Plugin):
    """The last term, for the log."""

    caught_by: ClassVar[str] = "no_graph_kept"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        self.last = real_logits.square().mean()
        return self.term(self.last)


@dataclass(eq=False)
class KeepsTheLastGraphs(Plugin):
    """The last means, no more, but each with the graph of its step."""

    caught_by: ClassVar[str] = "no_graph_kept"

    def __post_init__(self) -> None:
        self.past: deque[Tensor] = deque(maxlen=4)

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        self.past.append(real_logits.mean())
        return self.term(real_logits.square().mean())


@dataclass(eq=False)
class KeepsEverything(Plugin):
    """All terms, for a plot."""

    caught_by: ClassVar[str] = "no_leak"

    def __post_init__(self) -> None:
        self.history: list[Tensor] = []

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())

    @hookimpl
    def post_step(self, terms: dict[str, Tensor]) -> None:
        self.history += terms.values()


class NewParameters(Plugin):
    """Clipping by a new parameter: the optimiser goes on with the old one."""

    caught_by: ClassVar[str] = "parameters_kept"

    @hookimpl
    def post_step(self, gan: GAN, phase: str) -> None:
        if phase == "d":
            for m in gan.discriminator.modules():
                if isinstance(m, nn.Linear):
                    m.weight = nn.Parameter(m.weight.detach().clamp(-0.1, 0.1))


class Freezes(Plugin):
    """The first weights of D are to stay as they are, which its author forgot to take out again."""

    caught_by: ClassVar[str] = "parameters_kept"

    @hookimpl
    def setup(self, gan: GAN) -> None:
        next(gan.discriminator.parameters()).requires_grad_(False)


class Explodes(Plugin):
    """0 / 0 in every weight."""

    caught_by: ClassVar[str] = "parameters_kept"

    @hookimpl
    @torch.no_grad()
    def post_step(self, gan: GAN, phase: str) -> None:
        if phase == "d":
            for p in gan.parameters("d"):
                p.div_((p - p).norm()).mul_(0)
