"""Which training samples come next: every sample once per epoch, in an order drawn from a generator of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gankit.data import Dataset
from gankit.distributed import Team


class Sampler:
    """Endless batches (B, \\*shape) of a data set, reshuffled every epoch; what is left over at its end is dropped.

    A data set smaller than a batch is repeated within it. The state is the generator's at the start of the epoch and
    the position in it, so it is small whatever the size of the data. The processes of a ``team`` draw the same batches, and
    each gets its rows.
    """

    def __init__(self, data: Dataset, batch_size: int, generator: torch.Generator, team: Team | None = None) -> None:
        self.data, self.batch_size, self.generator = data, batch_size, generator
        self.team = team or Team()
        self._shuffle()

    def _shuffle(self) -> None:
        self.epoch_start = self.generator.get_state()
        repeats = -(-self.batch_size // len(self.data))
        orders = [torch.randperm(len(self.data), generator=self.generator, device=self.generator.device)
                  for _ in range(repeats)]  # fmt: skip
        self.order = torch.cat(orders)
        self.position = 0

    def __call__(self) -> Tensor:
        """The next batch."""
        end = self.position + self.batch_size
        if end > len(self.order):
            self._shuffle()
            end = self.batch_size
        index = self.order[self.position : end]
        self.position = end
        return self.data.batch(self.team.rows(index))

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch."""
        return {"epoch_start": self.epoch_start, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.generator.set_state(state["epoch_start"])
        self._shuffle()
        self.position = state["position"]
