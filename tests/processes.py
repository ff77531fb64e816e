"""Processes of their own that train, alone or two together: a module that the processes can import, too."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore

from gankit import cli, distributed, hookimpl, losses
from gankit.contract import Player
from gankit.distributed import Team, Together
from gankit.gan import GAN, Latent
from gankit.loop import train
from gankit.plugins import create
from gankit.training import Averaging

IN_TREE = sorted(path.parent.name for path in Path(__file__).parents[1].glob("plugins/*/pyproject.toml"))
IMAGES = ("diffaugment", "inception", "progressive", "self_attention", "stacked", "virtual_batch_norm")
OPTIONS: dict[str, dict[str, Any]] = {"inception": {"extractor": "halves.py:features", "metrics": "fid"}}
SAME_LOSS = {
    "non_saturating": True, "wasserstein": True, "hinge": True, "relativistic": True, "relativistic_average": False
}  # fmt: skip

# -- processes -----------------------------------------------------------------------------------------------------

CONTEXT = multiprocessing.get_context("forkserver")  # which imports torch once
CONTEXT.set_forkserver_preload(["gankit.run", "gankit.cli", "gankit.terminal", "torch._dynamo"])


def process(rank: int, size: int, port: int, folder: Path, act: Callable[..., None], *arguments: Any) -> None:
    """What torchrun does before it starts a program; each process in a folder of its own, as on machines of their own."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    counts = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is with whoever starts them
    os.environ.update({**address, **{name: str(count) for name, count in counts.items()}})
    (folder / str(rank)).mkdir(exist_ok=True)
    inside(folder / str(rank), act, *arguments)


def inside(folder: Path, act: Callable[..., None], *arguments: Any) -> None:
    """Act in a folder and write what is printed into its file "output"."""
    os.chdir(folder)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which whoever runs the tests may ignore, as under nohup
    act(*arguments)


def alone(*arguments: str) -> Any:
    """A command in a process of its own, which works in this one's folder and is started when this returns."""
    made = CONTEXT.Process(target=inside, args=(Path.cwd(), command, *arguments))
    made.start()
    return made


def start(folder: Path, act: Callable[..., None], *arguments: Any, size: int = 2) -> list[Any]:
    """Processes that meet at a store of this one, as torchrun's do, on a port that the system gives it and keeps."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = [CONTEXT.Process(target=process, args=(r, size, store.port, folder, act, *arguments)) for r in range(size)]
    for one in made:
        one.start()
        one.store = store  # type: ignore[attr-defined]  # which lives as long as they are known
    return made


def end(folder: Path, processes: list[Any], seconds: float = 120) -> tuple[list[int | None], list[str]]:
    """Exit codes and outputs, once all have ended; one that hangs is killed and has the code None."""
    until = time.monotonic() + seconds
    for one in processes:
        one.join(max(0, until - time.monotonic()))
    codes = [one.exitcode for one in processes]
    for one in processes:
        one.kill()
    return codes, [(folder / str(rank) / "output").read_text() for rank in range(len(processes))]


def gankit(folder: Path, *arguments: str) -> tuple[list[int | None], list[str]]:
    """A command in two processes, as ``torchrun --nproc-per-node 2 -m gankit`` runs it."""
    return end(folder, start(folder, command, *arguments))


def command(*arguments: str) -> None:
    """Without what is drawn at the end of a run, which takes seconds."""
    cli.main([*arguments, "--no-report"])


def done(folder: Path, *arguments: str) -> str:
    codes, (said, silent) = gankit(folder, *arguments)
    assert codes == [0, 0], said + silent
    assert silent == ""
    return said


# -- training ------------------------------------------------------------------------------------------------------


def tensors(gan: GAN) -> dict[str, Tensor]:
    return {f"{net}.{key}": t.clone() for net, state in gan.weights().items() for key, t in state.items()}


def trained(
    team: Team,
    plugins: dict[str, object],
    *,
    image: bool = False,
    steps: int = 3,
    loss: str = "non_saturating",
    **settings: Any,
) -> GAN:
    shape, batch = ((1, 32, 32), 8) if image else ((3,), 8)
    core = {"averaging": Averaging(0.9)}
    if team.size > 1:
        core["team"] = Together(team, SimpleNamespace(improved=False))  # type: ignore[assignment, arg-type]
    gan = GAN(
        **{"generator": None, "discriminator": None, "architecture": {"width": 8}, **settings},
        shape=shape, latent=Latent(4), loss=losses.make(loss), plugins=plugins, core=core, batch_size=batch,
    )  # fmt: skip
    gan.team = team
    stream = torch.Generator().manual_seed(0)
    gan.next_real = lambda: team.rows(torch.rand(batch, *shape, generator=stream) * 2 - 1)
    gan.build()
    team.unite(gan)
    train(gan, steps)
    return gan


def with_plugin(name: str, team: Team) -> GAN:
    """A few steps in double precision; without batch norm, which on a CPU couples the samples of a share itself."""
    torch.set_default_dtype(torch.float64)
    norm = nn.BatchNorm2d
    if name != "virtual_batch_norm":
        nn.BatchNorm2d = lambda channels: nn.GroupNorm(1, channels)  # type: ignore[assignment, misc]
    try:
        return trained(team, create([name], {name: OPTIONS.get(name, {})})[0], image=name in IMAGES)
    finally:
        nn.BatchNorm2d = norm  # type: ignore[misc]
        torch.set_default_dtype(torch.float32)


def measured(name: str, team: Team) -> tuple[bool, str]:
    """Whether the processes agree bit for bit, and what one process would have made of it; in process 0."""
    gan = with_plugin(name, team)
    ranks, drew = team.gathered(tensors(gan)), team.gathered(f"plugin:{name}" in gan.rngs)
    if team.rank:
        return False, ""
    agree = all(torch.equal(t, ranks[1][key]) for key, t in ranks[0].items())
    if alike(ranks[0], tensors(with_plugin(name, Team()))):
        return agree, "the same"
    return agree, "own random numbers" if drew[1] else "by share"


def alike(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.allclose(t, two[key], rtol=1e-9, atol=1e-12) for key, t in one.items())


class Sometimes:
    """Brings two networks: one has a gradient in process 1 alone, the other nowhere."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @hookimpl
    def players(self) -> dict[str, Player]:
        return {"some": Player(nn.Linear(1, 1), "d"), "none": Player(nn.Linear(1, 1), "d")}

    @hookimpl
    def pre_d_loss(self, gan: GAN) -> dict[str, Tensor] | None:
        return {"some": gan.players["some"].module.weight.square().sum()} if self.rank else None


class Draws:
    """Draws numbers in set-up and in training, and keeps them."""

    def __init__(self) -> None:
        self.numbers: list[float] = []

    @hookimpl
    def setup(self, gan: GAN) -> None:
        self.draw(gan)

    @hookimpl
    def post_step(self, gan: GAN) -> None:
        self.draw(gan)

    def draw(self, gan: GAN) -> None:
        self.numbers.append(torch.rand((), generator=gan.rng(self)).item())


class Latents:
    """Keeps the latents it sees."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    @hookimpl(wrapper=True)
    def sample(self) -> Any:
        batch = yield
        self.seen.append(torch.cat([batch.z, batch.real], 1))
        return batch


def everything(folder: Path) -> None:
    """What the tests below look at, in process 0 to a file."""
    with distributed.joined():
        team, found = distributed.team(), {}
        Path("halves.py").write_text("def features(x): return x[:, 0, ::8, ::8].flatten(1)")
        found |= {f"plugin {name}": measured(name, team) for name in IN_TREE}
        torch.set_default_dtype(torch.float64)
        for loss in SAME_LOSS:
            ranks = team.gathered(tensors(trained(team, {}, loss=loss)))
            found[f"loss {loss}"] = [ranks, tensors(trained(Team(), {}, loss=loss))]
        torch.set_default_dtype(torch.float32)

        def keep(name: str, value: Any) -> None:
            found[name] = team.gathered(value)

        keep("many", tensors(trained(team, create(["gradient_penalty", "lecam"], {})[0], steps=40)))
        calibrated = {"minibatch_discrimination": {"calibrate": "scale"}, "virtual_batch_norm": {"on": "both"}}
        norm = {"discriminator": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1)),
                "generator": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))}  # fmt: skip
        torch.manual_seed(team.rank)
        for module in norm.values():
            for p in module.parameters():
                nn.init.normal_(p)
        keep("given", norm["generator"][0].weight.clone())
        keep("start", tensors(trained(team, {}, **norm, steps=0)))
        keep("batch norm", tensors(trained(team, {}, **norm)))
        keep("fitted", tensors(trained(team, create([*calibrated], calibrated)[0], **norm, steps=1)))
        gan = trained(team, {"sometimes": Sometimes(team.rank)}, steps=1)
        keep("sometimes", [gan.players["some"].module.weight, gan.players["none"].module.weight.grad])
        keep("moments", {len(gan.optimizers["d"].state[p]) for p in gan.players["none"].module.parameters()})
        for name, plugin in (("draws", Draws()), ("latents", Latents())):
            trained(team, {name: plugin})
            keep(name, vars(plugin))
        alone = Latents()
        trained(Team(), {"latents": alone})
        found["alone"] = alone.seen
        if team.rank == 0:
            torch.save(found, folder / "found.pt")
