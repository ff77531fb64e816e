"""One run over several processes: ``torchrun -m gankit run ...``. What it means: docs/distributed.md; why so: decision 7.

Every process has all networks and its share of every batch. Gradients are averaged right before an optimiser's step,
whatever made them; the loop and the plugins know nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from gankit.errors import Lost, UsageError
from gankit.hookspecs import hookimpl

if TYPE_CHECKING:
    from gankit.contract import Player
    from gankit.gan import GAN
    from gankit.training import Evaluator

PATIENCE = timedelta(hours=6)  # how long processes wait for the one that evaluates
T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """A block in which this process belongs to the group that torchrun's variables describe; alone without them.

    Process 0 alone writes to the terminal. Of errors the first is raised; where another process has raised one, this one
    ends in silence, with SystemExit.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    backend = "gloo"
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        store, rank, size = next(rendezvous("env://"))
    except ValueError as error:  # of a variable that is missing or no number
        raise UsageError(
            f"RANK and WORLD_SIZE are set, as for one of several processes, and not by torchrun ({error}): unset them, or "
            "start with torchrun -m gankit"
        ) from None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        with ExitStack() as silent:
            if rank:
                nowhere = silent.enter_context(open(os.devnull, "w"))
                silent.enter_context(redirect_stdout(nowhere))
                silent.enter_context(redirect_stderr(nowhere))
            yield
    except (Exception, KeyboardInterrupt) as error:
        try:
            first = store.add("gankit/failed", 1) == 1
        except RuntimeError:  # the process that holds the store has ended before
            first = False
        if not first:
            raise SystemExit(1) from error
        raise
    finally:
        dist.destroy_process_group()


def reach(communicate: Callable[..., Any], *args: Any) -> None:
    """Call a function of ``torch.distributed``; its errors become :class:`Lost`."""
    try:
        communicate(*args)
    except RuntimeError as error:
        raise Lost(
            f"another process of this run ended or cannot be reached ({error}); gankit resume continues from the latest "
            "checkpoint"
        ) from error


@dataclass(frozen=True)
class Team:
    """The processes that train one GAN: this one is number ``rank`` of ``size``, ``here`` of which are on its machine.

    The methods are collective: all processes call them, in the same order.
    """

    rank: int = 0
    size: int = 1
    here: int = 1

    def check(self, batch: int, device: torch.device) -> None:
        """UsageError for a batch that cannot be shared equally, or fewer devices than processes."""
        if batch % self.size:
            fitting = -(-batch // self.size) * self.size
            raise UsageError(
                f"{self.size} processes share each batch, and {batch} does not divide by {self.size}: use --batch {fitting}"
            )
        if device.type == "cuda" and self.here > torch.cuda.device_count():
            raise UsageError(
                f"{self.here} processes need as many CUDA devices, and this machine has {torch.cuda.device_count()}: set "
                "torchrun's --nproc-per-node, or use --device cpu"
            )

    def rows(self, joined: Tensor) -> Tensor:
        """This process's rows of a joined batch (B, ...): (B / size, ...)."""
        share = len(joined) // self.size
        return joined[self.rank * share : (self.rank + 1) * share]

    def led(self, act: Callable[[], T]) -> T:
        """What ``act`` returns, which process 0 alone calls."""
        box: list[Any] = [act() if self.rank == 0 else None]
        if self.size > 1:
            reach(dist.broadcast_object_list, box)
        made: T = box[0]
        return made

    def gathered(self, value: T) -> list[T]:
        """In process 0, what each gave, by rank; elsewhere nothing."""
        found: list[Any] = [None] * self.size if self.rank == 0 else []
        reach(dist.gather_object, value, found or None)
        return found

    def mean(self, row: Mapping[str, Any]) -> dict[str, float]:
        """In process 0, the means of the numbers of all processes' rows, by name, over those that have it."""
        rows = self.gathered(row)
        names = dict.fromkeys(name for r in rows for name in r)
        values = {name: [r[name] for r in rows if name in r] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}

    def any(self, *flags: bool) -> list[bool]:
        """Which of the flags are set in some process."""
        tensor = torch.tensor(flags, dtype=torch.uint8)
        reach(dist.all_reduce, tensor, dist.ReduceOp.MAX)
        return [bool(flag) for flag in tensor.tolist()]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give these tensors the values they have in process 0."""
        targets = [t.detach() for t in tensors if t.numel()]
        parts = [t.flatten().view(torch.uint8) for t in targets]
        if not parts:
            return
        joined = torch.cat(parts)
        reach(dist.broadcast, joined, 0)
        for target, part in zip(targets, torch.split(joined, [len(part) for part in parts]), strict=True):
            target.copy_(part.clone().view(target.dtype).view(target.shape))

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make ``.grad`` its mean over the processes; a missing one counts as zero, unless all miss it."""
        kinds: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            kinds.setdefault(parameter.dtype, []).append(parameter)
        for dtype, same in kinds.items():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in same]
            there = torch.tensor([float(p.grad is not None) for p in same], dtype=dtype, device=same[0].device)
            joined = torch.cat([*(g.flatten() for g in gradients), there])
            reach(dist.all_reduce, joined)
            *means, there = torch.split(joined / self.size, [*(p.numel() for p in same), len(same)])
            torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)])
            if any(p.grad is None for p in same):  # looked at only here: on a GPU it waits
                for parameter, gradient, share in zip(same, gradients, there.tolist(), strict=True):
                    parameter.grad = gradient if share else None

    def attend(self, optimizer: torch.optim.Optimizer, players: Mapping[str, Player]) -> None:
        """Before each step of the optimiser: average its gradients, and give the players' buffers process 0's values."""

        def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self.average(p for group in optimizer.param_groups for p in group["params"])
            self.share(b for player in players.values() for b in player.module.buffers())

        if self.size > 1:
            optimizer.register_step_pre_hook(before_step)

    def unite(self, gan: GAN) -> None:
        """Give a built GAN process 0's networks, averages included; on a GPU, let batch norm see the joined batch."""
        if self.size == 1:
            return
        if gan.device.type == "cuda":
            for name, player in gan.players.items():
                player.module = nn.SyncBatchNorm.convert_sync_batchnorm(player.module)  # type: ignore[no-untyped-call]
                setattr(gan, name, player.module)
        self.share_networks(gan)

    def share_networks(self, gan: GAN) -> None:
        """Give all networks process 0's parameters and buffers."""
        self.share(t for module in gan.networks().values() for t in (*module.parameters(), *module.buffers()))


def team() -> Team:
    """The processes this one has joined, or itself alone."""
    if not dist.is_available() or not dist.is_initialized():
        return Team()
    return Team(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Together:
    """What the processes settle among themselves during training, as hook implementations.

    ``stop``: set by signals in one process, obeyed by all after the same step.
    """

    def __init__(self, team: Team, evaluator: Evaluator) -> None:
        self.team, self.evaluator = team, evaluator
        self.stop = False
        self.began = False

    @hookimpl(wrapper=True, tryfirst=True)
    def critic(self, gan: GAN) -> Generator[None, Callable[..., Tensor], Callable[..., Tensor]]:
        """Before the first scores: what plugins fitted to the first batch becomes what process 0 made of its rows."""
        critic = yield
        if gan.step and not self.began:  # not where process 0 measures before the first step
            self.team.share_networks(gan)
            self.began = True
        return critic

    @hookimpl(wrapper=True, tryfirst=True)
    def post_step(self, gan: GAN, phase: str) -> Generator[None, Any, Any]:
        """After all plugins: wait for process 0, which evaluates; then agree on whether to save and to stop."""
        done = yield
        if phase == "g":
            gan.stop, self.evaluator.improved = self.team.any(gan.stop or self.stop, self.evaluator.improved)
        return done
