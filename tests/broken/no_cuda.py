"""A device in the code; in a file of its own, as the whole file is read."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from broken import Plugin
from gankit import hookimpl


class WritesCuda(Plugin):
    """It works where there is a GPU, as long as everything lies on the first one."""

    caught_by: ClassVar[str] = "no_cuda"

    @hookimpl
    def pre_d_loss(self, real_logits: Tensor) -> dict[str, Tensor]:
        if torch.cuda.is_available():
            real_logits = real_logits.cuda()
        return self.term(real_logits.square().mean())
