"""Wrong before anything trains, or at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from broken import Plugin
from gankit import GAN, Batch, Player, View, hookimpl
from gankit.functional import squared_gradient_norm


@dataclass(eq=False)
class NoHelp(Plugin):
    """An option that says nothing about itself."""

    caught_by: ClassVar[str] = "options"
    power: float = 2.0

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.abs().pow(self.power).mean())


@dataclass(eq=False)
class TableOption(Plugin):
    """An option that no command line can give."""

    caught_by: ClassVar[str] = "options"
    powers: Annotated[Mapping[str, float], "powers"] = field(default_factory=lambda: {"real": 2.0})

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.abs().pow(self.powers["real"]).mean())


@dataclass(eq=False)
class Needy(Plugin):
    """An option without a default."""

    caught_by: ClassVar[str] = "options"
    power: Annotated[float | None, "the power"] = None

    def __post_init__(self) -> None:
        if self.power is None:
            raise ValueError("give the power")

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.abs().pow(self.power or 1).mean())


@dataclass
class ByValue(Plugin):
    """``eq=False`` forgotten."""

    caught_by: ClassVar[str] = "two_instances"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())


class ByName(Plugin):
    """Equal to every other instance."""

    caught_by: ClassVar[str] = "two_instances"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return 0

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())


class Misspelt(Plugin):
    """A hook that there is not."""

    caught_by: ClassVar[str] = "hooks"

    @hookimpl
    def pre_d_los(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())


class WrongArgument(Plugin):
    """An argument that the hook does not offer."""

    caught_by: ClassVar[str] = "hooks"

    @hookimpl
    def pre_d_loss(self, real_logit: Tensor) -> dict[str, Tensor]:
        return self.term(real_logit.square().mean())


class Unmarked(Plugin):
    """A hook without its marker."""

    caught_by: ClassVar[str] = "hooks"

    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())


class Anonymous(Plugin):
    """No paper."""

    caught_by: ClassVar[str] = "described"
    paper: ClassVar[str] = ""

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())


class Unfinished(Plugin):
    """It was begun from a template, and so it stayed."""

    caught_by: ClassVar[str] = "described"
    paper: ClassVar[str] = "TODO: authors, year, title"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())


class Terse(Plugin):
    """Terse."""

    caught_by: ClassVar[str] = "described"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())


class CrashesOnImages(Plugin):
    """A matrix product that knows vectors only, not refused for images."""

    caught_by: ClassVar[str] = "three_steps"
    data: ClassVar[tuple[str, ...]] = ("vector", "image")

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term((view.real[0] @ view.real[0].T).trace() * real_logits.square().mean())


class FreesTheGraph(Plugin):
    """A slope taken without create_graph: the graph of the logits is gone when the loop needs it."""

    caught_by: ClassVar[str] = "three_steps"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        (slope,) = torch.autograd.grad(real_logits.sum(), view.real)
        return self.term((slope.flatten(1).norm(dim=1) * real_logits).mean())


class SlopeOfTheBatch(Plugin):
    """The slope with respect to samples from which no logits were computed."""

    caught_by: ClassVar[str] = "three_steps"

    @hookimpl
    def pre_d_loss(self, batch: Batch, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(squared_gradient_norm(real_logits, (batch.real,)).mean())


class CutOff(Plugin):
    """A slope without a graph: the contract refuses it."""

    caught_by: ClassVar[str] = "three_steps"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(squared_gradient_norm(real_logits, view.real).mean().detach())


class WrongName(Plugin):
    """A term called by what everybody calls theirs."""

    caught_by: ClassVar[str] = "names"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return {"penalty": self.weight * real_logits.square().mean()}


class TakenName(Plugin):
    """A network in the place where the GAN has the folder of the run."""

    caught_by: ClassVar[str] = "names"

    @hookimpl
    def players(self) -> dict[str, Player]:
        return {"folder": Player(nn.Linear(1, 1), "d")}

    @hookimpl
    def pre_d_loss(self, gan: GAN, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(gan.players["folder"].module(real_logits.reshape(-1, 1)).square().mean())


class LogOfNothing(Plugin):
    """A logarithm of 0."""

    caught_by: ClassVar[str] = "finite"

    @hookimpl
    def pre_d_loss(self, batch: Batch, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.mean() - (batch.real - batch.real).square().sum().log())
