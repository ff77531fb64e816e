"""Several processes as one run: the same weights as one process, equal on all, and one end for all, good or bad."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from processes import IN_TREE, SAME_LOSS, alike, done, end, everything, gankit, start, trained
from torch import Tensor, nn

from gankit import UsageError, cli, distributed
from gankit import run as running
from gankit.distributed import Team

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
ALONE = ["--standalone", "--local-addr", "127.0.0.1"]  # on a port that is free
FAST = ["run", "--steps", "12", "--batch", "16", "--width", "8", "--eval-every", "4", "--save-every", "5",
        "--log-every", "3", "--eval-samples", "50", "--keep", "9", "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("library")
    codes, outputs = end(folder, start(folder, everything, folder))
    assert codes == [0, 0], "\n".join(outputs)
    result: dict[str, Any] = torch.load(folder / "found.pt")
    return result


@pytest.mark.parametrize("loss", SAME_LOSS)
def test_two_processes_train_as_one_with_the_joined_batch(loss: str, found: dict[str, Any]) -> None:
    (one, two), alone = found[f"loss {loss}"]
    assert all(torch.equal(t, two[key]) for key, t in one.items())
    assert alike(one, alone) == SAME_LOSS[loss]


@pytest.mark.parametrize("name", IN_TREE)
def test_every_plugin_keeps_the_processes_equal_and_is_what_the_table_says(name: str, found: dict[str, Any]) -> None:
    agree, kind = found[f"plugin {name}"]
    assert agree
    rows = dict(re.findall(r"^\| (\w+) \| ([\w ]+) \|", PAGE.read_text(), re.MULTILINE))
    assert rows.get(name) == kind


@pytest.mark.parametrize("name", ["many", "batch norm", "fitted"])
def test_the_processes_stay_equal_bit_for_bit(name: str, found: dict[str, Any]) -> None:
    """Over many steps with numbers of their own; buffers and averages, too; what is fitted to the first batch, too."""
    one, two = found[name]
    assert [key for key, t in one.items() if not torch.equal(t, two[key])] == []
    assert any("_ema" in key for key in one)


def test_all_start_from_the_networks_of_process_0(found: dict[str, Any]) -> None:
    assert not torch.equal(*found["given"])
    one, two = found["start"]
    assert torch.equal(one["generator.0.weight"], found["given"][0])
    assert [key for key, t in one.items() if not torch.equal(t, two[key])] == []


def test_a_gradient_that_only_some_have_counts_and_one_that_none_has_stays_away(found: dict[str, Any]) -> None:
    (one, none), (two, also_none) = found["sometimes"]
    assert torch.equal(one, two)
    assert none is None and also_none is None
    assert found["moments"] == [{0}, {0}]


def test_gradients_are_means_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.zeros(1, dtype=torch.float64)),
        nn.Parameter(torch.zeros(3)),
    ]
    parameters[0].grad, parameters[1].grad = torch.tensor([2.0, 4.0]), torch.ones(1, dtype=torch.float64)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda joined: joined.add_(1))  # three others have 1 in all
    Team(0, 4).average(parameters)
    assert [p.grad.tolist() for p in parameters if p.grad is not None] == [[0.75, 1.25], [0.5], [0.25, 0.25, 0.25]]


def test_set_up_draws_the_same_numbers_and_training_each_its_own(found: dict[str, Any]) -> None:
    one, two = (state["numbers"] for state in found["draws"])
    assert one[0] == two[0]
    assert not set(one[1:]) & set(two[1:])


def test_latents_and_samples_are_one_stream_of_which_each_takes_its_rows(found: dict[str, Any]) -> None:
    one, two = (state["seen"] for state in found["latents"])
    assert len(one) > 6  # updates, and dry ones while D is built
    for joined, first, second in zip(found["alone"], one, two, strict=True):
        assert torch.equal(joined, torch.cat([first, second]))


# -- what a machine has --------------------------------------------------------------------------------------------


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gan = trained(Team(), {}, steps=0)
    monkeypatch.setattr(running, "WORTH_THREADS", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    assert running.choose_threads(gan) == 8
    gan.team = Team(0, 1, here=5)
    assert running.choose_threads(gan) == 3
    gan.team = Team(0, 1, here=40)
    assert running.choose_threads(gan) == 1


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    Team(0, 4, here=2).check(8, torch.device("cuda"))
    Team(0, 4, here=4).check(8, torch.device("cpu"))
    with pytest.raises(UsageError, match="this machine has 2"):
        Team(0, 4, here=4).check(8, torch.device("cuda"))


def test_on_a_gpu_batch_norm_sees_the_joined_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU shows it: the layers are torch's own synchronised ones, with the parameters that are trained."""
    generator = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    gan = trained(Team(), {}, generator=generator, steps=0)
    before = [id(p) for p in gan.parameters("g")]
    shared: list[int] = []
    monkeypatch.setattr(Team, "share", lambda self, tensors: shared.append(len(list(tensors))))
    gan.device = torch.device("cuda")
    Team(0, 2).unite(gan)
    assert isinstance(gan.generator[1], nn.SyncBatchNorm)
    assert [id(p) for p in gan.players["generator"].module.parameters()] == before
    assert shared


# -- whole runs ----------------------------------------------------------------------------------------------------


def run_of(folder: Path, name: str) -> Path:
    assert not (folder / "1" / "runs").exists()  # the other process writes nothing
    return folder / "0" / "runs" / name


def state(run: Path, step: int = 12) -> dict[str, Tensor]:
    """Everything in a checkpoint that must be equal bit for bit."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    weights = {file.stem: safetensors.torch.load_file(file) for file in folder.glob("*.safetensors")}
    found: dict[str, Tensor] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{prefix}/{key}", item)
        else:
            found[prefix] = value if isinstance(value, Tensor) else torch.tensor(hash(str(value)))

    kept = torch.load(folder / "state.pt", weights_only=True)
    del kept["facts"]
    walk("", {**kept, **weights})
    return found


def test_torchrun_trains_as_the_page_says(tmp_path: Path) -> None:
    (line,) = re.findall(r"^(torchrun .*) --data mnist$", PAGE.read_text(), re.MULTILINE)
    words = f"{line} --data ring --plugin r1 --steps 50 --eval-every 0 --eval-samples 50 --width 8".split()
    command = [sys.executable, "-m", "torch.distributed.run", *ALONE, *words[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("finished after step 50") == 1
    run = tmp_path / "runs" / "00000-ring-r1"
    assert {p.name for p in run.iterdir()} >= {
        "config.toml", "plugins.json", "env.json", "data.json", "stats.jsonl", "metrics.jsonl", "summary.json",
        "samples", "checkpoints", "curves.png", "report.html",
    }  # fmt: skip
    assert json.loads((run / "env.json").read_text())["processes"] == 2
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_continued_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    plugins = ["--plugin", "gradient_penalty", "--plugin", "lecam"]
    done(tmp_path, *FAST, *plugins, "--name", "whole")
    shutil.copytree(run_of(tmp_path, "whole"), run_of(tmp_path, "parts"), symlinks=True)
    for folder in run_of(tmp_path, "parts").glob("checkpoints/step-*"):  # as if it had been killed after step 5
        if int(folder.name[5:]) > 5:
            shutil.rmtree(folder)
    (run_of(tmp_path, "parts") / "summary.json").unlink()
    assert "finished after step 12" in done(tmp_path, "resume", "parts")
    whole, parts = (state(run_of(tmp_path, name)) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    assert not torch.equal(whole["/rngs/plugin:gradient_penalty"], whole["/others/0/rngs/plugin:gradient_penalty"])
    one, two = (whole[f"{prefix}/plugins/lecam/averages"] for prefix in ("", "/others/0"))
    assert not torch.equal(one, two)
    # another number of processes
    result = CliRunner().invoke(cli.main, ["resume", str(run_of(tmp_path, "parts")), "--steps", "20"])
    assert result.exit_code == 2
    assert "processes: 2 -> 1" in result.output


def test_what_is_recorded_is_of_the_joined_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(tmp_path, *FAST, "--plugin", "r1", "--name", "two")
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli.main, [*FAST, "--plugin", "r1", "--name", "one", "--no-report"]).exit_code == 0
    one, two = (
        [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
        for run in (tmp_path / "runs" / "one", run_of(tmp_path, "two"))
    )
    names = ("step", "d_loss", "d_loss/adv", "d_loss/r1", "g_loss", "lr_d")
    assert [[row[name] for name in names] for row in one] == [
        pytest.approx([row[name] for name in names], rel=1e-4) for row in two
    ]
    # without r1's noise in common: process 0's own losses are other numbers
    assert len(two) == 4


def test_a_batch_that_does_not_divide_is_refused_once_and_leaves_no_folder(tmp_path: Path) -> None:
    codes, outputs = gankit(tmp_path, *FAST, "--batch", "15")
    assert None not in codes and 0 not in codes
    assert "".join(outputs).strip().splitlines()[-1] == (
        "gankit: 2 processes share each batch, and 15 does not divide by 2: use --batch 16"
    )
    assert "".join(outputs).count("gankit:") == 1
    assert not list((tmp_path / "0" / "runs").iterdir())


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "b"}]
)
def test_variables_that_are_not_torchrun_s_are_one_sentence(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    refused = CliRunner().invoke(cli.main, ["plugins", "show", "r1"])
    assert refused.exit_code == 2 and "not by torchrun" in refused.output and "unset them" in refused.output


def test_a_flag_that_does_not_exist_is_one_sentence(tmp_path: Path) -> None:
    codes, outputs = gankit(tmp_path, "run", "--stepps", "3")
    assert None not in codes and 0 not in codes
    assert "".join(outputs).count("--stepps") == 1


PLUGINS = """
import os, signal
from gankit import UsageError, hookimpl
RANK = os.environ.get("RANK")
class Bad:
    @hookimpl
    def pre_d_loss(self, real_logits, step):
        return {"bad": real_logits.mean() * (float("nan") if step == 8 and RANK == "1" else 0.0)}
class Refuses:
    @hookimpl
    def post_step(self, step):
        if step == 8 and RANK == "1":
            raise UsageError("it cannot be")
class Refuses0(Refuses):
    @hookimpl
    def evaluate(self, step):
        if step == 8:
            raise UsageError("it cannot be")
class RefusesAtFirst:
    @hookimpl
    def setup(self):
        if RANK == "1":
            raise UsageError("it cannot be")
class Breaks:
    @hookimpl
    def post_g_loss(self, step):
        return {}["x"] if step == 8 and RANK == "1" else None
class Dies:
    @hookimpl
    def post_g_loss(self, step):
        if step == 8 and RANK == "1":
            os.kill(os.getpid(), signal.SIGKILL)
class Ends:
    @hookimpl
    def post_step(self, gan, phase, step):
        gan.stop = gan.stop or (step == 8 and phase == "g" and RANK == "1")
class Stops:
    @hookimpl
    def post_step(self, phase, step):
        if step == 8 and phase == "d" and RANK == "1":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.py"
    path.write_text(PLUGINS)
    return str(path)


@pytest.mark.parametrize(
    ("plugin", "sentence"),
    [
        ("Bad", "gankit: step 8: term 'bad' of the discriminator's loss is nan; the last good checkpoint is "
                "runs/r/checkpoints/step-000005; lower --lr-g and --lr-d, or a plugin's weight"),
        ("Refuses", "gankit: it cannot be"),
        ("Refuses0", "gankit: it cannot be"),
        ("RefusesAtFirst", "gankit: it cannot be"),
        ("Breaks", "KeyError: 'x'\nin plugin 'breaks', hook 'post_g_loss'"),
        ("Dies", r"gankit: another process of this run ended or cannot be reached"),
    ],
)  # fmt: skip
def test_what_ends_one_process_ends_all_with_one_message(plugin: str, sentence: str, tmp_path: Path, bad: str) -> None:
    codes, outputs = gankit(tmp_path, *FAST, "--plugin", f"{bad}:{plugin}", "--name", "r")
    said = "".join(outputs)
    assert None not in codes and 0 not in codes, said  # none hangs
    assert said.count(sentence) == 1
    assert said.count("Traceback") == (plugin == "Breaks")
    assert said.count("gankit:") == (plugin != "Breaks")
    steps = sorted(p.name for p in run_of(tmp_path, "r").glob("checkpoints/step-*"))
    assert steps[-1:] == ([] if plugin == "RefusesAtFirst" else ["step-000005"])
    assert run_of(tmp_path, "r").exists() == (plugin != "RefusesAtFirst")


@pytest.mark.parametrize("plugin", ["Ends", "Stops"])
def test_one_process_that_stops_or_gets_a_signal_stops_all_after_the_same_step_and_leaves_a_run_to_continue(
    plugin: str, tmp_path: Path, bad: str
) -> None:
    plugins = ["--plugin", f"{bad}:{plugin}", "--plugin", "gradient_penalty"]
    assert "interrupted after step 8 of 12" in done(tmp_path, *FAST, *plugins, "--name", "r", "--save-every", "0")
    assert (run_of(tmp_path, "r") / "checkpoints" / "step-000008").is_dir()
    assert "finished after step 12" in done(tmp_path, "resume", "r")
