"""Mathematics that regularizers share: pure functions of tensors, or of tuples of tensors, without any gankit object."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mixing_weights(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One u ~ U(0, 1) per sample, (B, 1, ..., 1) with the dimensions, dtype and device of ``like``."""
    shape = (len(like), *(1,) * (like.dim() - 1))
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)


def interpolate(
    real: Sequence[Tensor],
    fake: Sequence[Tensor],
    generator: torch.Generator | None = None,
    *,
    detach: bool = True,
) -> tuple[Tensor, ...]:
    """Random points on the segments from fake to real: u real + (1 - u) fake, one u ~ U(0, 1) per sample.

    real, fake: tuples of tensors (B, ...), the critic's arguments; the same u serves all of a sample's tensors. Tensors
    that are not floating (labels) are taken from real. Returns detached leaves that require gradients; with
    ``detach=False`` the points keep the graph of what they are mixed from, for unrolling through a penalty. Raises
    ValueError if no tensor is floating.
    """
    floating = next((t for t in real if t.is_floating_point()), None)
    if floating is None:
        raise ValueError("there is nothing to mix: give at least one floating tensor a side")
    u = mixing_weights(floating, generator).flatten()

    def mix(r: Tensor, f: Tensor) -> Tensor:
        if not r.is_floating_point():
            return r
        weight = u.to(r.dtype).view(-1, *(1,) * (r.dim() - 1))
        point = weight * r + (1 - weight) * f
        return point.detach().requires_grad_() if detach or not point.requires_grad else point

    return tuple(mix(r, f) for r, f in zip(real, fake, strict=True))


def extra_pass(module: nn.Module, *inputs: Tensor) -> Tensor:
    """module(\\*inputs) in its present mode, with a graph, but without moving its buffers.

    For a forward pass that a method adds: batch norm keeps counting the batches that the model is trained on, and spectral
    norm's vectors stay where they were.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    output: Tensor = torch.func.functional_call(module, buffers, inputs) if buffers else module(*inputs)
    return output


def logit_per_sample(logits: Tensor) -> Tensor:
    """(B,) the mean logit of each sample, over all other dimensions: of (B, 1) or a patch critic's map (B, 1, H, W).

    ValueError for a tensor without dimensions.
    """
    if not logits.dim():
        raise ValueError("the critic must give one logit per sample, (B,) or (B, ...), not their mean")
    return logits.flatten(1).mean(1) if logits.dim() > 1 else logits


def input_gradients(logits: Tensor, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """d logits_i / d inputs_i for every sample i, with a graph for a second derivative.

    logits: (B, ...); several logits of one sample are averaged by :func:`logit_per_sample`, so that the gradient is that
        of the sample's mean logit.
    inputs: the tensor (B, ...), or the tuple of the critic's arguments, that the logits were computed from, requiring
        gradients; of a tuple those not floating (labels) are left out.

    Correct only if no logit depends on another sample, which batch normalisation in the critic violates. Raises ValueError
    if no input is floating, or one of them did not require gradients when the logits were computed.
    """
    per_sample = logit_per_sample(logits)
    floating = [t for t in ((inputs,) if isinstance(inputs, Tensor) else inputs) if t.is_floating_point()]
    if not floating or not logits.requires_grad or not all(t.requires_grad for t in floating):
        raise ValueError("there is no slope to take: compute the logits from inputs that require gradients")
    return torch.autograd.grad(per_sample.sum(), floating, create_graph=True)


def squared_norm_per_sample(tensors: Sequence[Tensor]) -> Tensor:
    """(B,) squared Euclidean norm of each sample over all non-batch dimensions of all tensors."""
    # (B, 1, ...): flatten(1) alone would refuse a tensor of one number per sample, (B,)
    first, *others = (t.unsqueeze(1).flatten(1).square().sum(1) for t in tensors)
    return sum(others, start=first)


def squared_gradient_norm(logits: Tensor, inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """(B,) ||d logits_i / d inputs_i||^2 of every sample, over all floating inputs together, with a graph.

    Arguments, errors and limits as of :func:`input_gradients`: no forward pass, one double backward.
    """
    return squared_norm_per_sample(input_gradients(logits, inputs))


def norm_per_sample(tensors: Sequence[Tensor], eps: float = 0.0) -> Tensor:
    """(B,) Euclidean norm of each sample over all non-batch dimensions of all tensors: sqrt(sum of squares + eps).

    With eps = 0 the gradient at a zero sample is 0 instead of NaN.
    """
    squares = squared_norm_per_sample(tensors)
    if eps:
        return (squares + eps).sqrt()
    zero = squares == 0
    return torch.where(zero, squares, torch.where(zero, torch.ones_like(squares), squares).sqrt())
