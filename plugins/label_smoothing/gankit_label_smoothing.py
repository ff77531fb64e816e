"""Label smoothing for the discriminator (Salimans et al. 2016, arXiv:1606.03498), as functions and a gankit plugin."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

from torch import Tensor
from torch.nn.functional import softplus

from gankit import UsageError, hookimpl, losses

if TYPE_CHECKING:
    from gankit import GAN


def smoothed_logistic_d(
    real_logits: Tensor, fake_logits: Tensor, *, real_target: float = 0.9, fake_target: float = 0.0
) -> Tensor:
    """D's cross entropy with soft targets t for real and s for fake samples, in logits r and f.

        mean [softplus(-r) + (1 - t) r] + mean [softplus(f) - s f]

    which is the binary cross entropy of sigmoid(r) with t and of sigmoid(f) with s; section 3.4 of arXiv:1606.03498 with
    t = 0.9, s = 0. The best D is (t p_data + s p_model) / (p_data + p_model).

    real_logits, fake_logits: any shapes, larger = more real; the mean is taken over everything. Returns a 0-dim tensor. With
    t = 1 and s = 0 this is ``gankit.losses.logistic_d``, bit for bit. Costs nothing.
    """
    real = softplus(-real_logits)
    fake = softplus(fake_logits)
    if real_target != 1:
        real = real + (1 - real_target) * real_logits
    if fake_target != 0:
        fake = fake - fake_target * fake_logits
    return real.mean() + fake.mean()


def smoothed_least_squares_d(
    real_logits: Tensor,
    fake_logits: Tensor,
    *,
    a: float = 0.0,
    b: float = 1.0,
    real_target: float = 0.9,
    fake_target: float = 0.0,
) -> Tensor:
    """Least squares of D, which sends fakes to a and reals to b, with the targets a + t (b - a) and a + s (b - a).

        1/2 mean (r - a - t (b - a))^2 + 1/2 mean (f - a - s (b - a))^2

    It has the gradient of labels that are flipped with probability 1 - t on the real and s on the fake side, as the cross
    entropy with soft targets has; the paper has the logistic case only. Arguments, result and cost as for
    :func:`smoothed_logistic_d`; with t = 1 and s = 0 this is ``gankit.losses.least_squares_d``, bit for bit.
    """
    # convex combinations: exact at 0 and 1
    real, fake = ((1 - t) * a + t * b for t in (real_target, fake_target))
    return losses.least_squares_d(real_logits, fake_logits, a=fake, b=real)


SMOOTHED = (smoothed_logistic_d, smoothed_least_squares_d)


def smoothed(loss: losses.Loss, *, real_target: float = 0.9, fake_target: float = 0.0) -> losses.Loss:
    """The same adversarial loss with soft targets for D; G's loss stays as it is.

    real_target, fake_target: probabilities of being real, 0 <= fake_target < real_target <= 1. Logistic losses get
    :func:`smoothed_logistic_d`, least squares :func:`smoothed_least_squares_d`.

    Raises UsageError for other losses, whose D has no targets, for one that is smoothed already, and for targets out of
    range.
    """
    if not 0 <= fake_target < real_target <= 1:
        raise UsageError(
            f"targets are probabilities with fake_target below real_target, not real {real_target} and fake {fake_target}"
        )
    targets = {"real_target": real_target, "fake_target": fake_target}
    if loss.d is losses.logistic_d:
        return replace(loss, d=partial(smoothed_logistic_d, **targets), real_target=real_target)
    if isinstance(loss.d, partial) and loss.d.func in SMOOTHED:
        raise UsageError(f"the labels of the loss {loss.name} are smoothed already: smooth them once")
    if loss.real_target is not None and isinstance(loss.d, partial) and loss.d.func is losses.least_squares_d:
        a, b = loss.d.keywords["a"], loss.d.keywords["b"]
        target = (1 - real_target) * a + real_target * b
        return replace(loss, d=partial(smoothed_least_squares_d, a=a, b=b, **targets), real_target=target)
    raise UsageError(
        f"label smoothing needs a loss whose D has targets, and {loss.name} has none: "
        f"use --loss non_saturating, saturating or least_squares"
    )


@dataclass(eq=False)
class LabelSmoothing:
    """Ask the discriminator for 0.9 instead of 1 on real samples, so that it is never rewarded for being certain."""

    formula: ClassVar[str] = "D: mean [softplus(-D(x)) + (1 - t) D(x)] + mean [softplus(D(G(z))) - s D(G(z))]"
    paper: ClassVar[str] = "Salimans et al. 2016, Improved Techniques for Training GANs, arXiv:1606.03498, section 3.4"

    real_target: Annotated[float, "t: D's target on real samples, 1 is no smoothing"] = 0.9
    fake_target: Annotated[float, "s: D's target on generated samples; the paper warns of more than 0"] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.fake_target < self.real_target <= 1:
            raise ValueError("0 <= fake_target < real_target <= 1 must hold")

    @hookimpl
    def setup(self, gan: GAN) -> None:
        """Replace D's loss; refuse a loss without targets."""
        gan.loss = smoothed(gan.loss, real_target=self.real_target, fake_target=self.fake_target)
