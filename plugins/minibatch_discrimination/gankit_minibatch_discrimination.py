"""Minibatch discrimination (Salimans et al. 2016, arXiv:1606.03498, section 3.2) and ProGAN's minibatch standard deviation
(Karras et al. 2018, arXiv:1710.10196, section 3), as functions, as modules and as a gankit plugin."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gankit import UsageError, View, hookimpl
from gankit.checks import reparametrized
from gankit.functional import extra_pass
from gankit.structure import evaluating, listing, named, of_type, replace

if TYPE_CHECKING:
    from gankit import GAN

Kind = Literal["kernels", "stddev"]
# options of the other kind
OTHERS: dict[Kind, tuple[str, ...]] = {
    "kernels": ("group_size",),
    "stddev": ("kernels", "dims", "weight_norm", "average", "calibrate"),
}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CACHED = 2**17  # numbers that a processor's cache holds: matrices in it are handled several times faster
NEAREST = 2.0  # distance to the nearest other sample that the official code starts from


# -- the statistics ------------------------------------------------------------------------------------------------


def minibatch_similarities(projected: Tensor, *, include_self: bool = False, average: bool = False) -> Tensor:
    """How many samples of the batch are like sample i, for every kernel b: (B, kernels, dims) -> (B, kernels).

        o(x_i)_b = sum_{j != i} exp(-||M_{i,b} - M_{j,b}||_1)

    Section 3.2 of arXiv:1606.03498; M_i = f(x_i) T is sample i's matrix, ``projected``. Values lie in [0, B - 1]: B - 1 for
    a batch of one repeated sample, 0 where no other is near, and for a batch of one.

    projected: floating. All of the batch counts, so give real and generated samples in separate calls.
    include_self: sum over all j, as the paper prints it, i included; that is 1 more everywhere. The official code leaves i
        out (it adds 1e6 to its distance to itself), several ports leave it in.
    average: divide by the number of terms, which makes the value independent of the batch size; a variant of ports.

    Differentiable to any order; the sign of 0 counts as 0, so identical samples have finite gradients. Time
    O(B^2 kernels dims). Memory, beside ``projected``: two B x B matrices for each of a few kernels at a time (half a
    megabyte each; one kernel at least), in a second derivative dims times that; a third one, of unrolling through a gradient
    penalty, keeps B^2 kernels dims numbers. Raises ValueError for another number of dimensions.
    """
    if projected.dim() != 3:
        raise ValueError(
            f"give one matrix per sample, (B, kernels, dims), not a tensor of shape {tuple(projected.shape)}"
        )
    total: Tensor = _Similarities.apply(projected.permute(2, 1, 0)).T  # type: ignore[no-untyped-call]
    total = total + include_self
    return total / max(1, len(projected) - (not include_self)) if average else total


def minibatch_stddev(x: Tensor, group_size: int = 4, features: int = 1, eps: float = 1e-8) -> Tensor:
    """Append how much a group of samples varies: (B, C, ...) -> (B, C + features, ...), one number per group.

        s = mean over channels and positions of sqrt(var_group x + eps)

    Section 3 of arXiv:1710.10196: the standard deviation of each feature at each position over the batch (divided by the
    number of samples, not by one less), averaged over all of them and shown to all samples at all positions.

    x: (B, C, *positions), vectors (B, F) included. The group's samples are n, n + M, n + 2 M, ..., as in the official code.
    group_size: 4 as in the official code; of at least the batch: one group, as in the paper. There are
        M = max(1, B // group_size) groups; where the batch does not divide, which the official code refuses, some of them
        have more samples than ``group_size``, and sizes differ by one at most.
    features: split the channels into so many parts with a number each, as StyleGAN's code can; must divide C.
    eps: variance added inside the root, so that identical samples, and a batch of one, give sqrt(eps) and finite gradients.

    Differentiable to any order; memory and time of a few copies of x. Raises ValueError for sizes that do not fit.
    """
    if x.dim() < 2 or group_size < 1 or features < 1 or x.shape[1] % features:
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} has no statistics for group_size={group_size}, features={features}: give "
            "(B, C, ...), sizes of 1 or more, and features that divide C"
        )
    batch = len(x)
    groups = max(1, batch // group_size)
    rows = -(-batch // groups)
    missing = groups * rows - batch  # the last row lacks so many samples
    present = torch.ones(batch, dtype=x.dtype, device=x.device)
    mask = F.pad(present, (0, missing)).view(rows, groups, 1)
    values = F.pad(x.flatten(1), (0, 0, 0, missing)).view(rows, groups, -1)
    count = mask.sum(0)
    centred = (values - values.sum(0) / count) * mask
    deviation = (centred.square().sum(0) / count + eps).sqrt()
    per_group = deviation.view(groups, features, -1).mean(2)
    per_sample = per_group.repeat(rows, 1)[:batch]
    return _append(x, per_sample)


def _append(x: Tensor, statistics: Tensor) -> Tensor:
    """(B, C, *positions) and (B, K) -> (B, C + K, *positions), the same at all positions."""
    maps = statistics.view(*statistics.shape, *(1,) * (x.dim() - 2)).expand(*statistics.shape, *x.shape[2:])
    return torch.cat([x, maps], dim=1)


class _Similarities(torch.autograd.Function):
    """(dims, kernels, B) -> (kernels, B), sum_{j != i} c_ij with c_ij = exp(-sum_d |m_di - m_dj|).

    Matrices of B x B live for a few kernels at a time, in memory that is used again, and are made anew in the backward pass:
    several times faster than broadcasting, whose time goes into getting memory. ``torch.cdist`` has no second derivative for
    this norm.
    """

    @staticmethod
    def forward(ctx: Any, m: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        return torch.cat([_similar(part, *work).sum(2) for part, *work in _workspaces(m)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        gradient: Tensor = _SimilaritiesBackward.apply(m, grads[0])  # type: ignore[no-untyped-call]
        return gradient


class _SimilaritiesBackward(torch.autograd.Function):
    """m, g -> -sum_j (g_i + g_j) c_ij s_dij with s_dij = sign(m_di - m_dj), (dims, kernels, B)."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(m, g)
        parts, start = [], 0
        for part, first, second in _workspaces(m):
            own = g[start : start + part.shape[1]]
            start += part.shape[1]
            weights = _similar(part, first, second)
            weights *= torch.add(own.unsqueeze(2), own.unsqueeze(1), out=second)
            rows = [_differences(row, second).sign_().mul_(weights).sum(2) for row in part]
            parts.append(-torch.stack(rows))
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        # ordinary operations, so that autograd has the third derivative and all others
        at_a_time = _at_a_time(grads[0])
        parts = [t.split(at_a_time, dim=-2) for t in (*ctx.saved_tensors, grads[0])]
        for_m, for_g = zip(*(_second_derivative(*part) for part in zip(*parts, strict=True)), strict=True)
        return torch.cat(for_m, dim=1), torch.cat(for_g)


def _second_derivative(m: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of <v, backward(m, g)> with respect to m and g: with u_ij = sum_d s_dij (v_di - v_dj),

    sum_j (g_i + g_j) c_ij u_ij s_dij, and -sum_j c_ij u_ij.
    """
    signs = [_differences(row).sign_() for row in m.detach()]
    similar = torch.exp(-sum((s * _differences(row) for s, row in zip(signs, m, strict=True)), start=m.new_zeros(())))
    u = similar * sum((s * _differences(row) for s, row in zip(signs, v, strict=True)), start=m.new_zeros(()))
    weights = (g.unsqueeze(2) + g.unsqueeze(1)) * u
    return torch.stack([(weights * s).sum(2) for s in signs]), -u.sum(2)


def _differences(row: Tensor, out: Tensor | None = None) -> Tensor:
    """row_i - row_j of (kernels, B) -> (kernels, B, B)."""
    return torch.sub(row.unsqueeze(2), row.unsqueeze(1), out=out)


def _similar(m: Tensor, total: Tensor, work: Tensor) -> Tensor:
    """c_ij of (dims, kernels, B), written into ``total``, with 0 on the diagonal."""
    total.zero_()
    for row in m:
        total -= _differences(row, work).abs_()
    total.exp_().diagonal(dim1=1, dim2=2).zero_()  # not "sum - 1" later, which in float32 rounds small sums away
    return total


def _at_a_time(m: Tensor) -> int:
    return max(1, CACHED // m.shape[-1] ** 2)


def _workspaces(m: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(dims, kernels, B) some kernels at a time, each with the same two work spaces (kernels, B, B)."""
    batch = m.shape[-1]
    work = m.new_empty(2, min(_at_a_time(m), m.shape[1]), batch, batch)
    for part in m.split(_at_a_time(m), dim=1):  # type: ignore[no-untyped-call]
        first, second = work[:, : part.shape[1]]
        yield part, first, second


# -- the modules ---------------------------------------------------------------------------------------------------


class MinibatchDiscrimination(nn.Module):
    """Append :func:`minibatch_similarities` of x T, less ``center``: (B, F) -> (B, F + kernels); maps flat, then as maps.

    in_features: F, or C * H * W for maps (B, C, H, W), which become (B, C + kernels, H, W).
    kernels, dims: B and C of the paper's tensor T (F, kernels, dims); the official code has 100 and 5, time grows with both.
    weight_norm: as in the official code, T = theta exp(log_scale) / ||theta|| per column, log_scale (kernels, dims) trained.
    average: the mean over the other samples instead of the sum.

    The columns of ``T`` start as random vectors of length 1, drawn from torch's global generator, as in the official code.
    The buffer ``center`` (kernels,) starts at 0; :meth:`calibrate` fits both to data. Batch, cost and derivatives as for
    the function; the projection is one more linear layer of kernels * dims units without bias.
    """

    def __init__(
        self,
        in_features: int,
        kernels: int = 32,
        dims: int = 5,
        *,
        weight_norm: bool = False,
        average: bool = False,
    ) -> None:
        super().__init__()
        if min(in_features, kernels, dims) < 1:
            raise ValueError(f"in_features, kernels and dims must be 1 or more, not {in_features}, {kernels}, {dims}")
        self.average = average
        theta = torch.randn(in_features, kernels, dims)
        self.T = nn.Parameter(theta / theta.norm(dim=0))
        self.log_scale = nn.Parameter(torch.zeros(kernels, dims)) if weight_norm else None
        self.center: Tensor
        self.register_buffer("center", torch.zeros(kernels))

    def projected(self, x: Tensor) -> Tensor:
        """M, (B, kernels, dims)."""
        theta = self.T
        if self.log_scale is not None:
            theta = theta * (self.log_scale.exp() / theta.norm(dim=0))
        return (x.flatten(1) @ theta.flatten(1)).view(len(x), *theta.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C + kernels, ...)."""
        similarities = minibatch_similarities(self.projected(x), average=self.average)
        return _append(x, similarities - self.center)

    @torch.no_grad()
    def calibrate(self, x: Tensor, *, rescale: bool = True) -> None:
        """Set ``center`` to the mean statistics of x, features of a batch of real samples, so that they start around 0.

        To be done once, before training. Without it a kernel to which all samples look alike adds B - 1 to whatever the next
        layer makes of it.

        rescale: before that, scale T, for every kernel, so that the nearest other sample is 2 away on average; both together
            are the data-based initialisation of the official code. It suits a discriminator whose features keep their scale
            (weight normalisation). In others they grow in training, and samples that start 2 apart are soon too far apart
            to look alike to any kernel. Kernels to which the samples look the same keep their scale.
        """
        projected = self.projected(x)
        if rescale:
            by_kernel = projected.transpose(0, 1)
            distances = torch.cdist(by_kernel, by_kernel, p=1)
            distances.diagonal(dim1=1, dim2=2).fill_(math.inf)
            nearest = distances.amin(2).mean(1)
            usable = nearest.isfinite() & (nearest > 0)
            scale = torch.where(usable, NEAREST / nearest, torch.ones_like(nearest)).unsqueeze(1)
            if self.log_scale is None:
                self.T.mul_(scale)
            else:
                self.log_scale.add_(scale.log())
            projected = scale * projected
        self.center.copy_(minibatch_similarities(projected, average=self.average).mean(0))

    def extra_repr(self) -> str:
        """Sizes."""
        features, kernels, dims = self.T.shape
        return f"{features}, kernels={kernels}, dims={dims}"


class MinibatchStddev(nn.Module):
    """:func:`minibatch_stddev` as a layer without parameters: (B, C, ...) -> (B, C + features, ...)."""

    def __init__(self, group_size: int = 4, features: int = 1) -> None:
        super().__init__()
        if group_size < 2 or features < 1:
            raise ValueError("group_size must be 2 or more and features 1 or more")
        self.group_size, self.features = group_size, features

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C + features, ...)."""
        return minibatch_stddev(x, self.group_size, self.features)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"group_size={self.group_size}, features={self.features}"


# -- into a network ------------------------------------------------------------------------------------------------


def widened(layer: nn.Module, extra: int) -> nn.Module:
    """A copy of a linear or convolutional layer that takes ``extra`` more features or channels, behind those it has.

    Weights and bias are kept; the new columns start like nn.Linear's, uniform within 1 / sqrt(fan_in) of the wide layer,
    from torch's global generator. Raises UsageError for another type of layer, a grouped convolution, and a weight that is
    computed from others (spectral norm and the like), which has no columns to add to.
    """
    if not isinstance(layer, LAYERS):
        raise UsageError(f"only linear and convolutional layers can be widened, not a {type(layer).__name__}")
    if reparametrized(layer):
        raise UsageError(
            "its weight is computed from others (spectral norm or the like): insert first, normalise afterwards"
        )
    if not isinstance(layer, nn.Linear) and layer.groups > 1:
        raise UsageError("its channels are in groups, and statistics belong to all of them: choose another layer")
    wide = copy.deepcopy(layer)
    new = layer.weight.new_empty(len(layer.weight), extra, *layer.weight.shape[2:])
    bound = 1 / math.sqrt((layer.weight.shape[1] + extra) * math.prod(layer.weight.shape[2:]))
    nn.init.uniform_(new, -bound, bound)
    wide.weight = nn.Parameter(torch.cat([layer.weight.detach(), new], dim=1), layer.weight.requires_grad)
    if isinstance(wide, nn.Linear):
        wide.in_features += extra
    else:
        wide.in_channels += extra
    return wide


@torch.no_grad()
def _inputs_of(root: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, list[Tensor]]:
    """What the linear and convolutional layers inside ``root`` are given, by name; the layer called last comes last.

    One forward pass in evaluation mode.
    """
    found: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, arguments: found.update({name: [*found.pop(name, []), arguments[0]]})

    handles = [m.register_forward_pre_hook(listen(name)) for name, m in of_type(root, *LAYERS).items()]
    try:
        with evaluating(root):
            root(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def insert(
    discriminator: nn.Module,
    *inputs: Tensor,
    kind: Kind = "kernels",
    before: str | None = None,
    kernels: int = 32,
    dims: int = 5,
    weight_norm: bool = False,
    average: bool = False,
    group_size: int = 4,
    features: int = 1,
) -> MinibatchDiscrimination | MinibatchStddev:
    """Let a layer of the discriminator see statistics of the minibatch beside what it is given; they are returned.

    The layer L, linear or convolutional, becomes Sequential(statistics, wider L) under its own name, with children
    ``statistics`` and ``layer``. The rest of the network, and L's weights for the inputs it had, stay. Parameters change, so
    do it before the optimiser is made, and before spectral norm. New weights come from torch's global generator.

    inputs: an example of what the discriminator is called with, two samples or more; values do not matter.
    kind: "kernels" for minibatch discrimination (``kernels``, ``dims``, ``weight_norm``, ``average``), "stddev" for ProGAN's
        minibatch standard deviation (``group_size``, ``features``).
    before: the name of L; default: the linear or convolutional layer that is called last, which makes the logits.

    Costs one forward pass. Raises UsageError, with the modules that there are, if there is no such layer, and if the layer
    found cannot be widened; then the discriminator is as it was.
    """
    given = _inputs_of(discriminator, inputs)
    name = _place(discriminator, given, before)
    layer = discriminator.get_submodule(name)
    extra = kernels if kind == "kernels" else features
    try:
        x = _input(given[name], layer, len(inputs[0]))
        if sum(p is layer.weight for _, p in discriminator.named_parameters(remove_duplicate=False)) > 1:
            raise UsageError("its weight is used in two places, which widening would separate")
        size = math.prod(x.shape[1:])
        statistics = (
            MinibatchDiscrimination(size, kernels, dims, weight_norm=weight_norm, average=average)
            if kind == "kernels"
            else MinibatchStddev(group_size, features)
        ).to(x)
        wide = widened(layer, extra)
        with torch.no_grad():
            statistics(x)  # so that sizes that do not fit are refused here
        replace(discriminator, name, lambda _: nn.Sequential(OrderedDict(statistics=statistics, layer=wide)))
    except ValueError as error:
        raise UsageError(
            f"minibatch statistics cannot go before {name!r}: {error}; the discriminator has {listing(discriminator)}"
        ) from error
    try:
        _inputs_of(discriminator, inputs)
    except (AttributeError, RuntimeError) as error:
        replace(discriminator, name, lambda _: layer)
        raise UsageError(
            f"the discriminator does not work with a Sequential in the place of {name!r} ({error}): name another layer "
            "with `before`"
        ) from error
    return statistics


def _place(root: nn.Module, given: dict[str, list[Tensor]], before: str | None) -> str:
    """The name of the layer that is to see the statistics."""
    if before is None:
        name = next(reversed(given), None)
        if name is None:
            raise UsageError(
                "minibatch statistics go before a linear or convolutional layer, and the discriminator calls none; it has "
                f"{listing(root)}"
            )
    else:
        layer, name = named(root, before, "discriminator"), before
        if name not in given:
            what = "it is never called" if isinstance(layer, LAYERS) else f"it is a {type(layer).__name__}"
            raise UsageError(
                f"minibatch statistics cannot go before {name!r}, for {what}: name a linear or convolutional layer that the "
                f"discriminator calls, one of {', '.join(given) or 'none'}"
            )
    if not name:
        raise UsageError(
            "the discriminator is a single layer, which only its owner can replace: put it into a Sequential"
        )
    return name


def _input(calls: list[Tensor], layer: nn.Module, batch: int) -> Tensor:
    """What the layer is given; UsageError where its rows are not the samples."""
    if len(calls) > 1:
        raise UsageError(f"it is called {len(calls)} times for one batch")
    (x,) = calls
    if len(x) != batch or (isinstance(layer, nn.Linear) and x.dim() != 2):
        raise UsageError(
            f"it is given a tensor of shape {tuple(x.shape)}, not one vector or map for each of {batch} samples"
        )
    return x


# -- the plugin ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class MinibatchStatistics:
    """Show D how alike the samples of a batch are, real or generated, so that a generator without variety is found out."""

    formula: ClassVar[str] = (
        "D's last layer sees [f(x_i), o_i],  o_i,b = sum_{j != i} exp(-||(f(x_i) - f(x_j)) T_b||_1);  stddev: mean std of f"
    )
    paper: ClassVar[str] = (
        "Salimans et al. 2016, Improved Techniques for Training GANs, arXiv:1606.03498, section 3.2; "
        "stddev: Karras et al. 2018, arXiv:1710.10196, section 3"
    )

    kind: Annotated[Kind, "kernels: minibatch discrimination; stddev: ProGAN's standard deviation"] = "kernels"
    kernels: Annotated[int, "number of statistics, B of the paper; the official code has 100"] = 32
    dims: Annotated[int, "dimensions of each kernel, C of the paper"] = 5
    weight_norm: Annotated[bool, "a trained length for each column of T, as in the official code"] = False
    average: Annotated[
        bool, "the mean over the other samples instead of the sum: weaker, the same for all batch sizes"
    ] = False
    calibrate: Annotated[
        Literal["center", "scale", "off"],
        "on the first real batch: center the statistics; scale: T, too, as the official code",
    ] = "center"
    group_size: Annotated[int, "samples that share one standard deviation; large: the whole batch, as in the paper"] = 4
    before: Annotated[str | None, "layer of D that sees the statistics; default: the one that makes the logits"] = None

    def __post_init__(self) -> None:
        if self.kernels < 1 or self.dims < 1:
            raise ValueError("kernels and dims must be at least 1")
        if self.group_size < 2:
            raise ValueError("group_size must be at least 2: one sample has no deviation")
        if self.kind not in ("kernels", "stddev"):
            raise ValueError(f"kind is 'kernels' or 'stddev', not {self.kind!r}")
        if self.calibrate not in ("center", "scale", "off"):
            raise ValueError(f"calibrate is 'center', 'scale' or 'off', not {self.calibrate!r}")
        for name in OTHERS[self.kind]:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"kind={self.kind} has no {name}: leave it out, or choose the other kind")
        self.layer: MinibatchDiscrimination | MinibatchStddev | None = None  # known after setup
        self.calibrated = False

    @hookimpl(tryfirst=True)
    def setup(self, gan: GAN) -> None:
        """Insert the statistics and widen the layer that sees them, before others look at D's layers."""
        shown = gan.first_view().real
        if len(shown[0]) < 2:
            raise UsageError(
                "minibatch_discrimination compares the samples of a batch, and the discriminator is shown one at a time: "
                "set a larger batch size"
            )
        with gan.initialising(self):
            self.layer = insert(
                gan.discriminator,
                *shown,
                kind=self.kind,
                before=self.before,
                kernels=self.kernels,
                dims=self.dims,
                weight_norm=self.weight_norm,
                average=self.average,
                group_size=self.group_size,
            )
        self.calibrated = self.calibrate == "off"

    @hookimpl(wrapper=True)
    def critic(self, gan: GAN, view: View, phase: str) -> Generator[None, Callable[..., Tensor], Callable[..., Tensor]]:
        """Before D's very first update, calibrate on the real side; the critic itself is handed on.

        A layer of a continued run has its center.
        """
        critic = yield
        layer, fresh = self.layer, phase == "d" and not self.calibrated
        if fresh and isinstance(layer, MinibatchDiscrimination) and not layer.center.any():
            caught: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda module, arguments: caught.append(arguments[0]))
            try:
                with torch.no_grad(), gan.initialising(self):
                    extra_pass(gan.discriminator, *view.real)
            finally:
                handle.remove()
            layer.calibrate(caught[-1], rescale=self.calibrate == "scale")
        self.calibrated |= fresh
        return critic
