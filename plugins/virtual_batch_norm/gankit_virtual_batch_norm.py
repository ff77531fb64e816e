"""Virtual batch normalisation (Salimans et al. 2016, arXiv:1606.03498, section 3.5), as functions and as a gankit plugin."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from gankit import UsageError, View, hookimpl, structure

if TYPE_CHECKING:
    from gankit import GAN

M = TypeVar("M", bound=nn.Module)

__all__ = ["VBN", "Statistics", "VirtualBatchNorm", "reference_of", "statistics", "virtual_batch_norm", "virtualize"]

PREFIX = "virtual_reference_"


class Statistics(NamedTuple):
    """What normalisation needs to know of a reference batch: mean and variance (C,), both biased, and its size n."""

    mean: Tensor
    variance: Tensor
    n: int


def statistics(reference: Tensor) -> Statistics:
    """Mean and variance of each channel of (n, C, \\*positions) over samples and positions, with their graph."""
    mean, variance = _moments(_flat(reference), (0, 2))
    return Statistics(mean.flatten(), variance.flatten(), len(reference))


def virtual_batch_norm(
    x: Tensor, reference: Statistics, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalise each sample by the reference batch and itself, as batch norm would in a batch of just these n + 1.

        y_i = weight (x_i - mu_i) / sqrt(var_i + eps) + bias
        mu_i = (n mu_ref + mean(x_i)) / (n + 1),   var_i = (n E_ref[x^2] + mean(x_i^2)) / (n + 1) - mu_i^2

    Section 3.5 of arXiv:1606.03498; the paper gives no formula, the weights n : 1 are those of its official code. Means of a
    sample are over its positions: one for vectors, H W for images. No y_i depends on another sample of x.

    x: (B, C, \\*positions). reference: of (n, C, \\*positions), see :func:`statistics`. weight, bias: (C,), or None for 1
    and 0. eps: added to the variance. Returns x's shape, twice differentiable in everything, x's share of mu and var too.
    """
    mean, variance = (moment.squeeze(2) for moment in _moments(_flat(x), (2,)))
    own, apart = 1 / (reference.n + 1), mean - reference.mean
    # the same variance as above; the difference of two large numbers would lose it when the mean is large
    variance = (1 - own) * reference.variance + own * variance + own * (1 - own) * apart.square()
    return _scaled(x, reference.mean + own * apart, variance + eps, weight, bias)


def _flat(x: Tensor) -> Tensor:
    """(B, C, \\*positions) as (B, C, number of positions)."""
    return x.unsqueeze(-1).flatten(2)


def _moments(x: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over some dimensions, which stay, of size 1."""
    mean = x.mean(over, keepdim=True)  # torch.var_mean takes five times as long on a CPU
    return mean, (x - mean).square().mean(over, keepdim=True)


def _scaled(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x - mean) / sqrt(variance) * weight + bias; mean and variance are (C,) or (B, C)."""
    scale = variance.rsqrt() if weight is None else variance.rsqrt() * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, x.shape[1], *(1,) * (x.dim() - 2))
    return torch.addcmul(shift.reshape(shape), x, scale.reshape(shape))


class VirtualBatchNorm(nn.Module):
    """The layer that takes a batch norm's place, with its ``weight`` and ``bias`` (the same parameters) and its ``eps``.

    It has no running statistics and does the same in training and in evaluation mode. It works inside a network that went
    through :func:`virtualize` only: in the pass of the reference batch, which is normalised by its own statistics, it takes
    note of them, call by call, and uses them in the same calls of the pass that follows.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, norm: Any) -> None:
        """``norm``: any of torch's batch norms, which has its shape."""
        super().__init__()
        self.num_features, self.eps = norm.num_features, norm.eps
        self.register_parameter("weight", norm.weight)
        self.register_parameter("bias", norm.bias)
        self.noting = False
        self.noted: list[Statistics] = []

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, \\*positions) normalised; RuntimeError when no reference went through this call before."""
        if self.noting:
            own = statistics(x)
            self.noted.append(own)
            return _scaled(x, own.mean, own.variance + self.eps, self.weight, self.bias)
        if not self.noted:
            raise RuntimeError(
                "a virtual batch norm has not seen the reference batch: call the network that virtualize was given, not "
                "a part of it or its forward"
            )
        return virtual_batch_norm(x, self.noted.pop(0), self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Size and eps, as torch's own norms show them."""
        return f"{self.num_features}, eps={self.eps}"


def virtualize(network: M, reference: Sequence[Tensor]) -> M:
    """Make every batch norm inside a network virtual, from now on: normalised by ``reference`` and the sample itself.

    Each call of the network first sends the reference batch through it, with the weights, mode and gradient mode of the
    call, so gradients also flow through the statistics, and second derivatives do. After that no output depends on another
    sample, as far as batch norm is concerned.

    network: changed in place and returned. Its parameters stay the same objects under the same names; the batch norms'
        buffers go, and ``virtual_reference_0``, ... come: the reference is a part of ``state_dict``. Copies
        (``copy.deepcopy``, pickles) and ``torch.func.functional_call`` work and stand on their own.
    reference: the network's positional arguments, tensors (n, \\*shape) of one n, copied.

    Costs one more forward pass (and backward) of n samples per call. Raises ValueError if the network has no batch norm, is
    one itself, is virtual already, has one with a forward method or parametrization of its own or a lazy one without
    shape, or if the tensors of the reference differ in n or are empty.
    """
    norms: dict[str, Any] = dict(structure.of_type(network, _BatchNorm))
    if _layers(network):
        raise ValueError(f"{type(network).__name__} has virtual batch norms already")
    if not norms:
        raise ValueError(f"{type(network).__name__} has no batch norm; it has {structure.listing(network)}")
    if "" in norms:
        raise ValueError("a batch norm by itself cannot be made virtual: put it into a network, nn.Sequential(norm)")
    for name, norm in norms.items():
        if type(norm).forward not in FORWARDS or parametrize.is_parametrized(norm):
            raise ValueError(f"the {type(norm).__name__} {name!r} has a forward or a parametrization of its own")
        if isinstance(norm.weight, nn.UninitializedParameter) or not norm.num_features:
            raise ValueError(f"the {type(norm).__name__} {name!r} has no shape yet: run a batch through the network")
    if not reference or len({len(t) for t in reference}) > 1 or not len(reference[0]):
        raise ValueError("a reference is a tuple of tensors, the network's arguments, with equally many samples each")
    for name in norms:
        structure.replace(network, name, VirtualBatchNorm)
    for i, tensor in enumerate(reference):
        network.register_buffer(f"{PREFIX}{i}", tensor.detach().clone())
    network.register_forward_pre_hook(_note)
    network.register_forward_hook(_forget, always_call=True)
    return network


FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def reference_of(network: nn.Module) -> tuple[Tensor, ...]:
    """The reference batch of a virtual network: its buffers themselves, to look at or to fill."""
    return tuple(b for name, b in network.named_buffers(recurse=False) if name.startswith(PREFIX))


def _layers(network: nn.Module) -> list[VirtualBatchNorm]:
    return [m for m in network.modules() if isinstance(m, VirtualBatchNorm)]


# Hooks of the network as a whole. They hold nothing and get the network as an argument, so that a copy has its own.


def _note(network: nn.Module, _: object) -> None:
    """Before a call: send the reference through."""
    layers = _layers(network)
    if any(layer.noting for layer in layers):  # this call is the reference's own
        return
    for layer in layers:
        layer.noting, layer.noted = True, []
    try:
        network(*reference_of(network))
    finally:
        for layer in layers:
            layer.noting = False


def _forget(network: nn.Module, _: object, __: object) -> None:
    """After a call: let go of the statistics and their graph, which could not be copied."""
    for layer in _layers(network):
        if not layer.noting:
            layer.noted = []


@dataclass(eq=False)
class VBN:
    """Normalise by a fixed reference batch instead of the batch at hand, which then couples no samples (virtual batch norm).

    ``on=g`` is the paper's use. D's reference is, half and half, what D is shown of real and of generated samples in its
    first update; until then it is zeros. The paper has none for D; its code would have built it from both sides, too.
    """

    formula: ClassVar[str] = "(x - mu) / sqrt(var + eps) of n reference samples and x itself, at every batch norm"
    paper: ClassVar[str] = "Salimans et al. 2016, Improved Techniques for Training GANs, arXiv:1606.03498, section 3.5"

    on: Annotated[Literal["g", "d", "both"], "networks: the generator as in the paper, the discriminator, both"] = "g"
    reference: Annotated[int | None, "samples in the reference batch; default: as many as there are in a batch"] = None

    def __post_init__(self) -> None:
        if self.reference is not None and self.reference < 2:
            raise ValueError("reference must be at least 2: one sample has no variance")
        if self.on not in ("g", "d", "both"):
            raise ValueError(f"on is 'g', 'd' or 'both', not {self.on!r}")
        self._chosen = True

    @hookimpl(tryfirst=True)
    def setup(self, gan: GAN) -> None:
        """Replace the batch norms of G and D; first, so that what follows sees a critic that scores samples one by one."""
        if self.on != "d":
            z = gan.latent.draw(self.reference or gan.batch_size, gan.rng(self))
            try:
                structure.output_shapes(gan.generator, z)
            except (TypeError, RuntimeError) as error:
                raise UsageError(
                    f"virtual_batch_norm draws latents of shape {tuple(z.shape)} for the generator's reference, and the "
                    f"generator does not take them by themselves: {error}"
                ) from error
            _virtualize(gan.generator, (z,), "generator")
        if self.on != "g":
            shown = gan.first_view().real
            n = self.reference or max(2, len(shown[0]))
            if n > 2 * len(shown[0]):
                raise UsageError(
                    f"virtual_batch_norm takes D's reference from its first update, which shows {len(shown[0])} real and "
                    f"as many generated samples: set virtual_batch_norm.reference to {2 * len(shown[0])} at most"
                )
            _virtualize(gan.discriminator, tuple(t.new_zeros(n, *t.shape[1:]) for t in shown), "discriminator")
            self._chosen = False

    @hookimpl(wrapper=True)
    def critic(self, gan: GAN, view: View) -> Generator[None, Callable[..., Tensor], Callable[..., Tensor]]:
        """Before D scores for the first time, let what it is shown be its reference; a continued run has one."""
        critic = yield
        if not self._chosen:
            self._chosen = True
            reference = reference_of(gan.discriminator)
            if not any(t.any() for t in reference):
                choose(reference, view)
        return critic


@torch.no_grad()
def choose(reference: Sequence[Tensor], view: View) -> None:
    """Fill D's reference: one half with the first samples of the real side, the other with those of the fake side."""
    for tensor, real, fake in zip(reference, *view, strict=True):
        half = len(tensor) // 2
        if len(real) < len(tensor) - half or len(fake) < half:
            raise UsageError(
                f"virtual_batch_norm takes its reference of {len(tensor)} samples from D's first batch, half of it real and "
                f"half generated, and that has {len(real)} and {len(fake)}: begin with a whole batch"
            )
        tensor.copy_(torch.cat([real[: len(tensor) - half], fake[:half]]))


def _virtualize(network: nn.Module, reference: tuple[Tensor, ...], name: str) -> None:
    try:
        virtualize(network, reference)
    except ValueError as error:
        raise UsageError(
            f"virtual_batch_norm cannot be used on the {name} (choose the network with virtual_batch_norm.on): {error}"
        ) from error
