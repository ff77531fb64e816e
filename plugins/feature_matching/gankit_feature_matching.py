"""Feature matching (Salimans et al. 2016, arXiv:1606.03498, section 3.1), as a function and as a gankit plugin."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from gankit import UsageError, View, hookimpl
from gankit.structure import calls

if TYPE_CHECKING:
    from gankit import GAN


def features(
    critic: Callable[..., Tensor], module: nn.Module, inputs: Sequence[Tensor], *, before: bool = False
) -> Tensor:
    """What ``module`` puts out (``before``: is given) while ``critic(*inputs)`` runs, (B, ...), with its graph.

    critic: anything that runs through ``module``, the discriminator itself or a functional version of it. The hook that
    listens is removed before the function returns, also after an error. Of several calls of the module the last counts.
    Raises UsageError if the critic does not reach the module, or if it hands on something else than one tensor.
    """
    caught: list[Any] = []
    if before:
        handle = module.register_forward_pre_hook(
            lambda _, arguments: caught.append(arguments[0] if arguments else None)
        )
    else:
        handle = module.register_forward_hook(lambda _, __, output: caught.append(output))
    try:
        critic(*inputs)
    finally:
        handle.remove()
    if not caught or not isinstance(caught[-1], Tensor):
        what = f"hands on a {type(caught[-1]).__name__}" if caught else "is not reached by the critic"
        raise UsageError(
            f"feature matching needs one tensor of features, but the {type(module).__name__} it looks at {what}: "
            "choose another layer"
        )
    return caught[-1]


def feature_matching(
    critic: Callable[..., Tensor],
    module: nn.Module,
    real: Tensor | Sequence[Tensor],
    fake: Tensor | Sequence[Tensor],
    *,
    before: bool = False,
) -> Tensor:
    """|| mean_i f(x_i) - mean_i f(G(z_i)) ||_2^2, the squared norm of the difference of two batch means.

    Section 3.1 of arXiv:1606.03498: f are the activations of an intermediate layer of the discriminator, each mean runs
    over its batch, the squares are *summed* over all features (channels and positions alike), not averaged.

    critic: from the tensors below to logits. module: the layer inside it whose output (``before``: first argument) is f.
    real, fake: (B, ...) each, or tuples, the critic's arguments. The batches may differ in size.

    Returns a 0-dim tensor with a graph to ``fake`` only; the real side is a target, computed without a gradient. Costs two
    critic forwards, no double backward. Raises UsageError as :func:`features` does.
    """
    real, fake = ((side,) if isinstance(side, Tensor) else tuple(side) for side in (real, fake))
    with torch.no_grad():
        target = features(critic, module, real, before=before).mean(0)
    return (features(critic, module, fake, before=before).mean(0) - target).square().sum()


def last_layer(critic: nn.Module, inputs: Sequence[Tensor]) -> str | None:
    """Name of the linear or convolutional layer that ``critic(*inputs)`` runs last, the one that makes the logits.

    The critic runs once, in evaluation mode and without gradients. None if it has no such layer.
    """
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    with torch.no_grad():
        called = [name for name, _ in calls(critic, *inputs) if isinstance(critic.get_submodule(name), kinds)]
    return called[-1] if called else None


def nothing(fake_logits: Tensor) -> Tensor:
    """0, with a graph: the adversarial loss of a generator that only matches features."""
    return 0 * fake_logits.mean()


@dataclass(eq=False)
class FeatureMatching:
    """Let G match the mean of D's features on data, a target that does not run away as D gets better.

    The term is added to G's adversarial loss by default, like every other term, so that it combines and weight 0 is no
    change. The paper trains G on it *instead*: ``replace=True`` makes G's adversarial loss 0.
    """

    formula: ClassVar[str] = "weight * || mean_i f(x_i) - mean_i f(G(z_i)) ||_2^2,  f: activations of a layer of D"
    paper: ClassVar[str] = "Salimans et al. 2016, Improved Techniques for Training GANs, arXiv:1606.03498, section 3.1"

    weight: Annotated[float, "weight of the term; the paper has none, that is 1"] = 1.0
    layer: Annotated[str | None, "module of D whose output is f; default: what D's last layer is given"] = None
    replace: Annotated[bool, "instead of the adversarial loss of G, as in the paper, not in addition"] = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError("weight must not be negative, infinite or NaN")
        if self.replace and self.weight == 0:
            raise ValueError("weight must be positive where the term replaces the adversarial loss")
        self.looks_at = ""  # the module's name and whether its input is meant, known after setup
        self.before = False

    @hookimpl(trylast=True)
    def setup(self, gan: GAN) -> None:
        """Find the layer; switch G's adversarial loss off if it is to be replaced."""
        modules = dict(gan.discriminator.named_modules())
        listed = ", ".join(name for name in modules if name)
        if self.layer is None:
            found = last_layer(gan.discriminator, gan.first_view().real)
            if found is None:
                raise UsageError(
                    "feature_matching finds no linear or convolutional layer in the discriminator: name the layer with "
                    f"-o feature_matching.layer=..., one of {listed or 'none, it has no modules'}"
                )
            self.looks_at, self.before = found, True
        else:
            if self.layer not in modules:
                raise UsageError(
                    f"the discriminator has no layer {self.layer!r} for feature_matching: choose from {listed}"
                )
            self.looks_at = self.layer
        if self.replace:
            gan.loss = replace(gan.loss, g=nothing, g_sides=("fake_logits",))

    @hookimpl
    def post_g_loss(self, gan: GAN, critic: Callable[..., Tensor], view: View) -> dict[str, Tensor] | None:
        """The term "feature_matching" on what the critic is shown, and on the critic of this update."""
        if self.weight == 0:
            return None
        module = gan.discriminator.get_submodule(self.looks_at)
        matching = feature_matching(critic, module, view.real, view.fake, before=self.before)
        return {"feature_matching": self.weight * matching}
