"""Self-attention of SAGAN (Zhang et al. 2019, arXiv:1805.08318), as function, module, and gankit plugin."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gankit import UsageError, hookimpl, structure

if TYPE_CHECKING:
    from gankit import GAN

ValueChannels = Literal["C/8", "C/2", "C"]

SHARES: dict[str, int] = {"C/8": 8, "C/2": 2, "C": 1}
LEAST_CHANNELS = 8  # C/8 of fewer would be none; images and maps of logits have fewer, too
LARGEST = 32  # positions attend to positions: 32 x 32 maps cost 4 MB per sample, 64 x 64 maps 64 MB


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What each position j gathers from all positions i: o_j = sum_i beta_ji h_i, beta_ji = softmax over i of f_i . g_j.

    Equations 1 and 2 of arXiv:1805.08318 without the convolutions; the paper does not divide by the root of the number of
    channels.

    queries g: (B, N, K). keys f: (B, M, K). values h: (B, M, V). Returns (B, N, V). Costs B N M numbers of memory. Written
    out, since torch's fused ``scaled_dot_product_attention`` has no second derivative, which gradient penalties need.
    Raises ValueError if the shapes do not fit.
    """
    shapes = [tuple(t.shape) for t in (queries, keys, values)]
    if {t.dim() for t in (queries, keys, values)} != {3} or (
        queries.shape[::2] != keys.shape[::2] or keys.shape[:2] != values.shape[:2]
    ):
        raise ValueError(
            f"queries (B, N, K), keys (B, M, K) and values (B, M, V) do not have the shapes "
            f"{', '.join(map(str, shapes))}"
        )
    return (queries @ keys.transpose(1, 2)).softmax(2) @ values


class SelfAttention2d(nn.Module):
    """The SAGAN block on maps x (B, C, H, W): y = gamma v(o) + x, o the attention of all positions to all positions.

        s_ij = f(x_i) . g(x_j),   beta_ji = exp(s_ij) / sum_i exp(s_ij),
        o_j = v(sum_i beta_ji h(x_i)),   y_j = gamma o_j + x_j

    Equations 1 to 3 of arXiv:1805.08318. ``key`` f and ``query`` g are 1x1 convolutions to C/8 channels, ``value`` h to
    ``value_channels``, ``out`` v back to C; none has a bias. ``gamma`` is learnt and starts at 0: then y = x, bit for bit.

    value_channels: "C/8" as in the paper, "C/2" as in the official code, "C" as in the paper's first version, where v is
    left out. At least one channel is kept. pool: keys and values from the largest of each 2 x 2 positions, as in the
    official code, a quarter of the work and memory (odd sides are rounded up). Weights start by Xavier's rule, as there.
    Raises ValueError for an unknown ``value_channels`` or no channels.
    """

    def __init__(self, channels: int, *, value_channels: ValueChannels = "C/8", pool: bool = False) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be 1 or more, not {channels}")
        if value_channels not in SHARES:
            raise ValueError(f"value_channels must be one of {', '.join(SHARES)}, not {value_channels!r}")
        inner = max(1, channels // 8)
        values = max(1, channels // SHARES[value_channels])
        self.pool = pool
        self.key = nn.Conv2d(channels, inner, 1, bias=False)
        self.query = nn.Conv2d(channels, inner, 1, bias=False)
        self.value = nn.Conv2d(channels, values, 1, bias=False)
        self.out = nn.Identity() if value_channels == "C" else nn.Conv2d(values, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) -> (B, C, H, W)."""
        keys, values = self.key(x), self.value(x)
        if self.pool:
            keys, values = (F.max_pool2d(t, 2, ceil_mode=True) for t in (keys, values))
        queries, keys, values = (t.flatten(2).transpose(1, 2) for t in (self.query(x), keys, values))
        gathered = attention(queries, keys, values).transpose(1, 2).reshape(len(x), -1, *x.shape[2:])
        # x first: the sum has its memory layout, so that later convolutions give the same bits as without this block
        y: Tensor = x + self.gamma * self.out(gathered)
        return y


class Attended(nn.Module):
    """A module, and self-attention on the maps it returns."""

    def __init__(self, module: nn.Module, attention: SelfAttention2d) -> None:
        super().__init__()
        self.module = module
        self.attention = attention

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The maps of the module, attended to."""
        maps: Tensor = self.attention(self.module(*inputs, **named))
        return maps


def insert(
    network: nn.Module,
    *inputs: Tensor,
    resolution: int | None = None,
    after: str | None = None,
    value_channels: ValueChannels = "C/8",
    pool: bool = False,
    name: str = "network",
) -> SelfAttention2d:
    """Put self-attention into a network, found by its maps or after a named module, and return the new block.

    network: changed in place; the chosen module ``m`` becomes ``m.module`` beside ``m.attention``, so do this before its
        optimiser is made. inputs: something to call it with; it is called twice, in evaluation mode.
    resolution: longer side of the maps to attend to; default: of the largest maps of at most half the side of the image
        (the longest side among inputs and output) and at most 32, as in the paper. Of the modules that return maps of
        this resolution with 8 channels or more, once per call, it is the last one that no earlier maps go around: the end
        of a residual block, not a layer inside it. Where skip connections leave no such module, it is the last one.
    after: name of a module instead, which returns maps (B, C, H, W) once per call, whatever their size.
    value_channels, pool: of :class:`SelfAttention2d`. name: what messages call the network.

    The weights start from torch's global random generator. Raises UsageError, which lists the maps there are, if nothing
    fits.
    """
    if resolution is not None and after is not None:
        raise UsageError("self-attention takes a resolution or the name of a module, not both: leave out one")
    trace = _trace(network, *inputs)
    if not trace.once:
        raise UsageError(
            f"self-attention needs maps (B, C, H, W), and no module of the {name} returns any once per call: it is for "
            f"convolutional networks of images; looked at: {structure.listing(network)}"
        )
    if after is None:
        place = _at_resolution(trace, resolution, network, name)
    else:
        structure.named(network, after, name)
        if after not in trace.once:
            raise UsageError(
                f"self-attention needs a module that returns maps (B, C, H, W) once per call, which {after!r} in the {name} "
                f"does not: name another; {_known(trace)}"
            )
        place = after
    maps = trace.once[place]
    block = SelfAttention2d(maps.shape[1], value_channels=value_channels, pool=pool).to(maps.dtype)
    structure.replace(network, place, lambda module: Attended(module, block))
    if f"{place}.attention" not in structure.output_shapes(network, *inputs):
        raise UsageError(
            f"the {name} does not call {place!r} by that name, so that it cannot be replaced: keep its modules in a "
            "ModuleList or as attributes, not in a list beside them"
        )
    return block


class _Trace(NamedTuple):
    """One call of a network: its maps in the order in which they came to be, and its output."""

    maps: list[tuple[str, Tensor]]  # of inputs, called "", and of modules; 1 x 1 maps are vectors, not maps
    once: dict[str, Tensor]  # the maps of modules that are called once
    output: Any


def _trace(network: nn.Module, *inputs: Tensor) -> _Trace:
    # copies with a graph, so that everything computed from them has one
    copies = [t.detach().requires_grad_().clone() if t.is_floating_point() else t for t in inputs]
    with torch.enable_grad():
        *calls, (_, output) = structure.calls(network, *copies)
    times = Counter(name for name, _ in calls)
    maps = [(name, t) for name, t in (*(("", t) for t in copies), *calls) if _is_maps(t)]
    return _Trace(maps, {name: t for name, t in maps if times[name] == 1}, output)


def _is_maps(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() == 4 and _side(output) > 1


def _side(maps: Tensor) -> int:
    return max(maps.shape[2:])


def _at_resolution(trace: _Trace, resolution: int | None, network: nn.Module, name: str) -> str:
    """Name of the module for self-attention on maps of this resolution; UsageError if there is none."""
    ends = [t for key, t in trace.maps if not key] + ([trace.output] if _is_maps(trace.output) else [])
    limit = min(max(map(_side, ends), default=0) // 2, LARGEST)
    fitting = {key: t for key, t in trace.once.items() if t.shape[1] >= LEAST_CHANNELS}
    side = resolution or max((_side(t) for t in fitting.values() if _side(t) <= limit), default=0)
    names = [key for key, t in fitting.items() if _side(t) == side and not _is_shell(key, trace)]
    if not names:
        wanted = f"of resolution {resolution}" if resolution else f"of at most half the image, {limit},"
        raise UsageError(
            f"self-attention needs maps {wanted} with {LEAST_CHANNELS} channels or more, which the {name} does not have: "
            f"choose another resolution or name a module; {_known(trace)}; looked at: {structure.listing(network)}"
        )
    return ([key for key in names if _carries_all(key, trace)] or names)[-1]


def _is_shell(name: str, trace: _Trace) -> bool:
    """Whether the module only hands on what a module inside it returned, as a Sequential does."""
    return any(t is trace.once[name] for key, t in trace.maps if key.startswith(f"{name}."))


def _carries_all(name: str, trace: _Trace) -> bool:
    """Whether no earlier maps reach the network's output other than through the output of this module."""
    here = trace.once[name].grad_fn
    before = {t.grad_fn for _, t in trace.maps[: [key for key, _ in trace.maps].index(name)]} - {here}
    seen, ahead = {here}, [trace.output.grad_fn if isinstance(trace.output, Tensor) else None]
    while ahead:
        node = ahead.pop()
        if node in before:
            return False
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    return here is not None


def _known(trace: _Trace) -> str:
    """What maps there are, one module for each resolution, for messages."""
    last = {_side(t): (name, t.shape[1]) for name, t in trace.once.items() if not _is_shell(name, trace)}
    listed = ", ".join(f"{side} (C = {channels}, {name!r})" for side, (name, channels) in last.items())
    return f"its resolutions are {listed}"


@dataclass(eq=False)
class SelfAttention:
    """Let every position of a feature map see all others, in G and in D: one self-attention block in each (SAGAN)."""

    formula: ClassVar[str] = "y_j = gamma v(sum_i beta_ji h(x_i)) + x_j,  beta_ji = softmax over i of f(x_i) . g(x_j)"
    paper: ClassVar[str] = "Zhang et al. 2019, Self-Attention GANs, arXiv:1805.08318, eqs. 1-3"

    on: Annotated[Literal["d", "g", "both"], "networks that get a block"] = "both"
    resolution: Annotated[int | None, "side of the maps; default: the largest up to half the image and up to 32"] = None
    g_after: Annotated[str | None, "module of G to put the block after, instead of a resolution"] = None
    d_after: Annotated[str | None, "the same in D"] = None
    value_channels: Annotated[ValueChannels, "C/8 the paper, C/2 the official code, C its first version"] = "C/8"
    pool: Annotated[bool, "attend to the largest of each 2 x 2 positions, as the official code does"] = False

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution < 2:
            raise ValueError("resolution must be at least 2")
        if self.on not in ("d", "g", "both"):
            raise ValueError(f"on is 'd', 'g' or 'both', not {self.on!r}")
        if self.value_channels not in SHARES:
            raise ValueError(f"value_channels must be one of {', '.join(SHARES)}, not {self.value_channels!r}")
        for phase, after in (("g", self.g_after), ("d", self.d_after)):
            if after is not None and self.on not in (phase, "both"):
                raise ValueError(f"{phase}_after names a place in a network that on={self.on} leaves alone")
        places = {"both": (self.g_after, self.d_after), "g": (self.g_after,), "d": (self.d_after,)}[self.on]
        if self.resolution is not None and None not in places:
            raise ValueError("resolution has no use where a module is named in every network: leave out one of the two")

    @hookimpl(tryfirst=True)
    def setup(self, gan: GAN) -> None:
        """Insert the blocks, before spectral norm, averages and optimisers look at the networks."""
        shown = gan.first_view().real
        z = gan.latent.draw(len(shown[0]), torch.Generator(gan.device).manual_seed(0))  # moves no stream of the run
        for phase, name, after, inputs in (
            ("g", "generator", self.g_after, (z,)),
            ("d", "discriminator", self.d_after, shown),
        ):
            if self.on not in (phase, "both"):
                continue
            try:
                with gan.initialising(self):
                    insert(
                        gan.players[name].module,
                        *inputs,
                        resolution=self.resolution if after is None else None,
                        after=after,
                        value_channels=self.value_channels,
                        pool=self.pool,
                        name=name,
                    )
            except UsageError as error:
                options = f"-o self_attention.resolution=..., -o self_attention.{phase}_after=..."
                raise UsageError(f"{error} ({options})") from error
