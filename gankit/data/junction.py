"""heavy-mode: frames of a fixed camera above a road junction, nearly all of them without a vehicle.

The setting of the pair-wise gradient penalty's article (arXiv 1802.00771): one huge mode, the static background, and rare
ones, vehicles. Here every rare one is known, so that it can be counted in generated frames.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gankit import metrics
from gankit.data.dataset import Dataset, Store, seeded
from gankit.errors import UsageError

ARM, LANE = 5, 3  # length of the roads that meet, width of each of their two lanes, in pixels
SIDE = 2 * (ARM + LANE)
COUNT, HELD_OUT = 40_000, 10_000
NOISE = 1.0  # standard deviation of the sensor noise, in grey levels of 0..255
BRIGHTNESS = 4.0  # a frame is at most so many grey levels brighter or darker than the drawing
TOLERANCE = 24.0  # how far off any square of 2 x 2 pixels of a valid frame may be, root mean square in grey levels

# Share of each configuration in per cent, and the lanes that are occupied in it. The main road runs from west to east. Two
# vehicles are there at once only while they wait at the same red light.
CONFIGURATIONS: dict[str, tuple[float, tuple[str, ...]]] = {
    "empty": (80.0, ()),
    "west arriving": (3.6, ("west arriving",)),
    "east arriving": (3.2, ("east arriving",)),
    "west leaving": (2.8, ("west leaving",)),
    "east leaving": (2.4, ("east leaving",)),
    "north arriving": (1.6, ("north arriving",)),
    "south arriving": (1.4, ("south arriving",)),
    "north leaving": (1.2, ("north leaving",)),
    "south leaving": (1.0, ("south leaving",)),
    "west and east arriving": (1.6, ("west arriving", "east arriving")),
    "north and south arriving": (1.2, ("north arriving", "south arriving")),
}
LANES = tuple(f"{arm} {way}" for arm in ("north", "west", "south", "east") for way in ("arriving", "leaving"))

_ROAD = slice(ARM, ARM + 2 * LANE)  # columns of the one road, rows of the other
_ASPHALT, _KERB, _PAINT, _GLASS = (84, 86, 92), (150, 148, 140), (208, 208, 204), (28, 32, 40)
_CORNERS = ((74, 112, 62), (92, 124, 70), (158, 104, 84), (84, 118, 60))  # lawns and a roof
_VEHICLES = ((224, 224, 220), (188, 44, 40))  # white, red


@dataclass(frozen=True, eq=False)
class Junction:
    """The drawing without noise, and by it the configuration that a frame shows.

    background: (3, 16, 16) float64, in grey levels of 0..255. regions: (8, 15) int64, the pixels of each lane in a frame
    flattened to 256. looks: (8, 3, 3, 15) float64, how a lane may look: free, or with a vehicle of one of the colours.
    shares: (11,) float64, how often each configuration occurs. names: of the configurations.
    """

    background: Tensor
    regions: Tensor
    looks: Tensor
    shares: Tensor
    names: tuple[str, ...]

    @classmethod
    def drawn(cls) -> "Junction":
        """The one junction of the data set."""
        background = _background()
        numbers = torch.arange(SIDE * SIDE).view(1, SIDE, SIDE)
        regions, looks = [], []
        for lane in range(len(LANES)):
            arm, leaving = divmod(lane, 2)
            left = ARM + leaving * LANE
            pixels = (slice(0, ARM), slice(left, left + LANE))  # with the junction turned so that the arm points up
            regions.append(torch.rot90(numbers, -arm, (1, 2))[:, *pixels].flatten())
            seen = torch.rot90(background, -arm, (1, 2))[:, *pixels]
            vehicles = [_with_vehicle(seen, color, bool(leaving)) for color in _VEHICLES]
            looks.append(torch.stack([seen, *vehicles]).flatten(2))
        shares = torch.tensor([share / 100 for share, _ in CONFIGURATIONS.values()], dtype=torch.float64)
        return cls(background, torch.stack(regions), torch.stack(looks), shares, tuple(CONFIGURATIONS))

    def frames(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Frames (N, 3, 16, 16) uint8 of the configurations (N,): vehicles of random colour, brightness and noise."""
        x = self.background.float().flatten(1).repeat(len(labels), 1, 1)
        for label, (_, lanes) in enumerate(CONFIGURATIONS.values()):
            rows = (labels == label).nonzero().flatten()
            for lane in map(LANES.index, lanes):
                look = torch.randint(1, self.looks.shape[1], (len(rows),), generator=generator)
                x[rows[:, None], :, self.regions[lane]] = self.looks[lane, look].float().transpose(1, 2)
        x += torch.empty(len(x), 1, 1).uniform_(-BRIGHTNESS, BRIGHTNESS, generator=generator)
        x += torch.empty_like(x).normal_(0, NOISE, generator=generator)
        return x.round_().clamp_(0, 255).to(torch.uint8).view(-1, 3, SIDE, SIDE)

    def assign(self, samples: Tensor) -> Tensor:
        """The configuration of each frame (N, 3, 16, 16) in [-1, 1], or -1 for what is no frame of this camera: (N,) int64.

        The nearest noiseless frame is found: brightness from the pixels outside the lanes, then for each lane the look that
        is nearest (Euclidean distance over its pixels). The frame is of the configuration with these lanes occupied if
        there is one, and if in every square of 2 x 2 pixels the root of the mean squared difference, channels included, is
        below ``TOLERANCE``. Noise reaches about 4; a vehicle that is there by 35 to 65 % is 25 off or more.
        """
        if samples.shape[1:] != (3, SIDE, SIDE):
            raise UsageError(f"heavy-mode has frames of shape (3, {SIDE}, {SIDE}), not {tuple(samples.shape[1:])}")
        return torch.cat([self._assign(chunk) for chunk in torch.split(samples.detach().cpu(), 1024)])

    def _assign(self, samples: Tensor) -> Tensor:
        x = (samples.double().flatten(2) + 1) * 127.5
        ideal = self.background.flatten(1).repeat(len(x), 1, 1)
        outside = torch.ones(SIDE * SIDE, dtype=torch.bool).index_fill(0, self.regions.flatten(), False)
        x -= (x - ideal)[..., outside].mean(dim=(1, 2), keepdim=True).clamp(-BRIGHTNESS, BRIGHTNESS)
        occupied = torch.zeros(len(x), len(LANES), dtype=torch.bool)
        for lane, (region, looks) in enumerate(zip(self.regions, self.looks, strict=True)):
            look = torch.cdist(x[..., region].flatten(1), looks.flatten(1)).argmin(dim=1)
            ideal[..., region] = looks[look]
            occupied[:, lane] = look > 0
        squares = (x - ideal).square().mean(dim=1).view(-1, 1, SIDE, SIDE)
        worst = F.avg_pool2d(squares, 2, stride=1).amax(dim=(1, 2, 3))
        known = torch.tensor([[lane in lanes for lane in LANES] for _, lanes in CONFIGURATIONS.values()])
        same = (occupied[:, None] == known).all(dim=2) & (worst < TOLERANCE**2)[:, None]
        return torch.where(same.any(dim=1), same.int().argmax(dim=1), -1)

    def metrics(self, samples: Tensor) -> dict[str, float]:
        """``gankit.metrics.share_metrics`` of the configurations, and ``rare_share``, the share of frames with vehicles."""
        labels = self.assign(samples)
        counts = torch.bincount(labels[labels >= 0], minlength=len(self.names))
        rare = int(counts[1:].sum()) / max(1, int(counts.sum()))
        return {**metrics.share_metrics(counts, len(samples), self.shares), "rare_share": rare}

    def to(self, device: torch.device | str) -> "Junction":
        """Itself: it counts on the CPU."""
        return self


def heavy_mode(image_size: int | None = None) -> Dataset:
    """40,000 frames (3, 16, 16) of a junction to train on, 10,000 held out; labels are the configurations.

    80 % are empty, the others hold one or two vehicles in one of 10 ways, the rarest 1 %: 20 are expected among 2,000
    frames, 100 among 10,000. Both parts hold every configuration exactly as often as its share says.
    """
    if image_size not in (None, SIDE):
        raise UsageError(
            f"heavy-mode is drawn in {SIDE} pixels, and its vehicles are counted there: leave image_size out"
        )
    junction, generator = Junction.drawn(), seeded(41)
    parts, labels = [], []
    for count in (COUNT, HELD_OUT):
        each = (junction.shares * count).round().long()
        ordered = torch.repeat_interleave(torch.arange(len(each)), each)
        labels.append(ordered[torch.randperm(count, generator=generator)])
        parts.append(torch.cat([junction.frames(some, generator) for some in torch.split(labels[-1], 2000)]))
    return Dataset(
        "heavy-mode",
        Store(parts[0]),
        Store(parts[1]),
        labels=labels[0],
        held_out_labels=labels[1],
        classes=junction.names,
        modes=junction,
    )


def _color(color: tuple[int, int, int]) -> Tensor:
    return torch.tensor(color, dtype=torch.float64).view(3, 1, 1)


def _background() -> Tensor:
    """The junction without vehicles, (3, 16, 16)."""
    canvas = torch.zeros(3, SIDE, SIDE, dtype=torch.float64)
    halves = (slice(0, SIDE // 2), slice(SIDE // 2, SIDE))
    for (rows, columns), color in zip(((r, c) for r in halves for c in halves), _CORNERS, strict=True):
        canvas[:, rows, columns] = _color(color)
    for _ in range(4):
        arm = canvas[:, :ARM]
        arm[:, :, _ROAD] = _color(_ASPHALT)
        arm[:, :, [_ROAD.start - 1, _ROAD.stop]] = _color(_KERB)
        arm[:, ::2, ARM + LANE - 1 : ARM + LANE] = _color(_PAINT)  # dashes between the lanes
        arm[:, -1:, ARM : ARM + LANE] = _color(_PAINT)  # where arriving vehicles stop
        canvas = torch.rot90(canvas, 1, (1, 2))
    canvas[:, _ROAD, _ROAD] = _color(_ASPHALT)
    return canvas


def _with_vehicle(lane: Tensor, color: tuple[int, int, int], leaving: bool) -> Tensor:
    """A lane (3, 5, 3) that points up with a vehicle of 4 x 2 pixels in it; its windscreen shows where it is going."""
    vehicle = _color(color).repeat(1, 4, 2)
    vehicle[:, 1:2] = _color(_GLASS)
    found = lane.clone()
    left = 1 if leaving else 0
    found[:, :4, left : left + 2] = vehicle if leaving else vehicle.flip(1)
    return found
