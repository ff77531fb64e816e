"""Looks at real modules, for plugins that refuse what cannot work: shared, so that all of them say it alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from gankit.losses import logistic_d

if TYPE_CHECKING:
    from gankit.gan import GAN


def batch_norms(module: nn.Module) -> list[str]:
    """Names of the batch normalisations inside a module."""
    return [name or type(module).__name__ for name, m in module.named_modules() if isinstance(m, _BatchNorm)]


def spectral_norms(module: nn.Module) -> list[str]:
    """Names of the layers whose weight has a spectral norm, by parametrization or by torch's older hook."""

    def normalised(layer: nn.Module) -> bool:
        own = getattr(layer, "parametrizations", {})
        new = any("SpectralNorm" in type(p).__name__ for chain in own.values() for p in chain)
        hooks = layer._forward_pre_hooks.values()
        return new or any(type(hook).__name__ == "SpectralNorm" for hook in hooks)

    return [
        name or type(module).__name__
        for name, layer in module.named_modules()
        if not isinstance(layer, parametrize.ParametrizationList) and normalised(layer)
    ]


def reparametrized(module: nn.Module) -> list[str]:
    """Names of the layers whose effective weight is computed from stored parameters (spectral or weight norm, ...)."""
    old = ("SpectralNorm", "WeightNorm")
    return [
        name or type(module).__name__
        for name, layer in module.named_modules()
        if parametrize.is_parametrized(layer) or any(type(h).__name__ in old for h in layer._forward_pre_hooks.values())
    ]


def need_logistic_loss(gan: GAN, plugin: str) -> None:
    """Refuse, as "<plugin>-loss", losses whose best logit is not the log ratio of the densities of real and fake.

    By D's loss as it is, so that one whose labels a plugin smooths is refused, too; call it when all have set up.
    """
    if gan.loss.d is not logistic_d:
        gan.refuse(
            f"{plugin}-loss",
            f"{plugin} reads D's logit as a log ratio, which the loss {gan.loss.name!r} does not make it here: "
            "choose --loss non_saturating, without smoothed labels",
        )


def need_per_sample_generator(gan: GAN, plugin: str) -> None:
    """Refuse a generator with batch norm: a sample depends on the other latents of its batch, so no slope is its own."""
    found = batch_norms(gan.generator)
    if found:
        gan.refuse(
            "generator-batch-norm",
            f"{plugin} needs the slope of each sample by itself, but the generator has batch norm at {found[0]!r}, which "
            "mixes samples: use one with layer, group, instance or pixel norm, or none",
        )


def need_per_sample_critic(gan: GAN, plugin: str) -> None:
    """Refuse a discriminator with batch norm: its logits mix samples, so no gradient is that of one sample."""
    found = batch_norms(gan.discriminator)
    if found:
        gan.refuse(
            "batch-norm",
            f"{plugin} needs the gradient of each sample by itself, but the discriminator has batch norm at "
            f"{found[0]!r}, which mixes samples: use layer, group or instance norm there, or none",
        )
