"""Right with the shipped networks, on full batches, alone; wrong elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from broken import Plugin
from gankit import GAN, Batch, Player, View, hookimpl
from gankit.functional import squared_gradient_norm


class SinglePrecision(Plugin):
    """``.float()``, whatever the dtype."""

    caught_by: ClassVar[str] = "float64"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.float().square().mean())


class NeedsTwo(Plugin):
    """The standard deviation of one sample."""

    caught_by: ClassVar[str] = "batch_sizes"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.flatten(1).mean(1).std() if real_logits.dim() > 1 else real_logits.std())


class FullBatches(Plugin):
    """The batch size of the run, not that of the batch."""

    caught_by: ClassVar[str] = "smaller_batch"

    @hookimpl
    def pre_d_loss(self, gan: GAN, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.view(gan.batch_size, -1).mean(1).square().mean())


class Broadcasts(Plugin):
    """(B, 1) - (B,) is (B, B)."""

    caught_by: ClassVar[str] = "logit_shapes"

    @hookimpl
    def pre_d_loss(self, critic: Callable[..., Tensor], view: View, real_logits: Tensor) -> dict[str, Tensor]:
        (x, *others) = view.real
        return self.term(
            (
                real_logits - critic(0.9 * x, *others).flatten(1).mean(1)
                if real_logits.dim() > 1
                else real_logits - critic(0.9 * x, *others)
            )
            .square()
            .mean()
        )


class BroadcastsSlopes(Plugin):
    """(B, 1) times (B,) is (B, B), silently."""

    caught_by: ClassVar[str] = "logit_shapes"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        logits = real_logits if real_logits.dim() < 3 else real_logits.flatten(1).mean(1)
        return self.term((logits.sigmoid() * squared_gradient_norm(real_logits, view.real)).mean())


class SevenTimes(Plugin):
    """Right for maps, and for (B,)."""

    caught_by: ClassVar[str] = "logit_shapes"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean() * (7 if real_logits.shape[1:] == (1,) else 1))


class SumsTheMap(Plugin):
    """``ones_like``: the slope of the sum of a patch critic's map, larger with every place of it."""

    caught_by: ClassVar[str] = "logit_shapes"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        (slope,) = torch.autograd.grad(real_logits, view.real[:1], torch.ones_like(real_logits), create_graph=True)
        return self.term(slope.flatten(1).square().sum(1).mean())


class OneArgument(Plugin):
    """The critic is called with the samples alone."""

    caught_by: ClassVar[str] = "several_inputs"

    @hookimpl
    def pre_d_loss(self, critic: Callable[..., Tensor], view: View, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term((critic(0.9 * view.real[0]) - real_logits).square().mean())


class AllSlopes(Plugin):
    """The slope with respect to all arguments, labels of whole numbers included."""

    caught_by: ClassVar[str] = "several_inputs"

    @hookimpl
    def pre_d_loss(self, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        outputs = torch.ones_like(real_logits) / real_logits[0].numel()
        slopes = torch.autograd.grad(real_logits, view.real, outputs, create_graph=True)
        return self.term(sum(s.flatten(1).square().sum(1) for s in slopes).mean())


class RowForRow(Plugin):
    """A logit for each sample of the batch, which under packing there is not."""

    caught_by: ClassVar[str] = "companions"

    @hookimpl
    def pre_d_loss(self, batch: Batch, real_logits: Tensor) -> dict[str, Tensor]:
        per_sample = real_logits.flatten(1).mean(1) if real_logits.dim() > 1 else real_logits
        return self.term((per_sample * batch.real.flatten(1).norm(dim=1)).square().mean())


class Untrained(Plugin):
    """A network that no loss reaches."""

    caught_by: ClassVar[str] = "players"

    @hookimpl
    def players(self) -> dict[str, Player]:
        return {"judge": Player(nn.Linear(3, 1), "d")}


class SeededStart(Plugin):
    """A network that begins the same in every run."""

    caught_by: ClassVar[str] = "players"

    @hookimpl
    def players(self, gan: GAN) -> dict[str, Player]:
        torch.manual_seed(0)
        return {"judge": Player(nn.Linear(1, 1), "d")}

    @hookimpl
    def pre_d_loss(self, gan: GAN, real_logits: Tensor) -> dict[str, Tensor]:
        judged = gan.players["judge"].module(real_logits.reshape(-1, 1))
        return self.term(judged.square().mean())


class RandomMetric(Plugin):
    """Another value each time."""

    caught_by: ClassVar[str] = "metrics"

    @hookimpl
    def evaluate(self, draw: Callable[[int], Tensor]) -> dict[str, float]:
        x = draw(50).flatten(1)
        return {"random_metric": (x @ torch.randn(x.shape[1])).std().item()}


class SeedsEverybody(Plugin):
    """Always the same directions, by seeding everybody's random numbers."""

    caught_by: ClassVar[str] = "metrics"

    @hookimpl
    def evaluate(self, draw: Callable[[int], Tensor]) -> dict[str, float]:
        torch.manual_seed(0)
        x = draw(50).flatten(1)
        return {"seeds_everybody": (x @ torch.randn(x.shape[1])).std().item()}


class MovesTheStream(Plugin):
    """Samples of its own, from the run's latents."""

    caught_by: ClassVar[str] = "metrics"

    @hookimpl
    def evaluate(self, gan: GAN) -> dict[str, float]:
        gan.next_z(5)
        return {"moves_the_stream": 1.0}


class KnownName(Plugin):
    """A metric under the name of one that some data have."""

    caught_by: ClassVar[str] = "metrics"

    @hookimpl
    def evaluate(self, draw: Callable[[int], Tensor]) -> dict[str, float]:
        return {"kl_to_truth": draw(50).mean().item()}


class OnlyOurs(Plugin):
    """A setting that only a run of gankit's own has."""

    caught_by: ClassVar[str] = "own_loop"

    @hookimpl
    def pre_d_loss(self, gan: GAN, view: View, real_logits: Tensor) -> dict[str, Tensor]:
        width = gan.architecture["width"]
        return self.term(squared_gradient_norm(real_logits, view.real).mean() / width)


class RateOfTheRun(Plugin):
    """Weighted by the rate that D would have in a run of gankit's; a loop of one's own has another."""

    caught_by: ClassVar[str] = "own_loop"

    @hookimpl
    def pre_d_loss(self, gan: GAN, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean() * 100 * gan.optim["d"].lr)


class NeedsTheAdversarialLoss(Plugin):
    """Its average is of a loss that some loops keep to themselves."""

    caught_by: ClassVar[str] = "own_loop"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        return self.term(real_logits.square().mean())

    @hookimpl
    def post_step(self, terms: dict[str, Tensor], phase: str) -> None:
        if phase == "d":
            self.average = terms["adv"]
