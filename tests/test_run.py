"""Whole runs through the command line: what they write, how they end, how they continue."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from PIL import Image
from processes import IMAGES, alone

from gankit import networks, plugins
from gankit.cli import main
from gankit.files import held

ROOT = Path(__file__).parents[1]
IN_TREE = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
FAST = ["--steps", "12", "--batch", "16", "--width", "8", "--eval-every", "4", "--save-every", "5", "--log-every", "3",
        "--eval-samples", "50", "--keep", "9"]  # fmt: skip

OPTIONS = {  # cheap
    "inception": (
        "inception.extractor=halves.py:features",
        "inception.metrics=fid,precision,recall",
        "inception.n=500",
    ),
    "ivom": ("ivom.n=9", "ivom.steps=5"),
}


def gankit(*arguments: str, code: int = 0, report: bool = False) -> Result:
    """A command; without the seconds of drawing at the end of a run, where they are not looked at."""
    undrawn = ["--no-report"] if arguments[0] in ("run", "resume") and not report else []
    result = CliRunner().invoke(main, [*arguments, *undrawn])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def final_state(run: Path, step: int = 12) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint that must be equal bit for bit."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    found = {
        f"{file.stem}/{key}": tensor
        for file in folder.glob("*.safetensors")
        for key, tensor in safetensors.torch.load_file(file).items()
    }
    state = torch.load(folder / "state.pt", weights_only=True)

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}/{key}", item)
        elif isinstance(value, list):
            walk(prefix, dict(enumerate(value)))
        else:
            found[prefix] = value if isinstance(value, torch.Tensor) else torch.tensor(hash(str(value)))

    walk("state", {k: v for k, v in state.items() if k != "facts"})
    return found


def rows(name: str) -> list[dict[str, float]]:
    """The lines of a record of the run "r"."""
    return [json.loads(line) for line in (Path("runs/r") / name).read_text().splitlines()]


def assert_equal_states(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def test_a_run_writes_what_it_promises() -> None:
    result = gankit("run", "--plugin", "gradient_penalty", "-o", "gradient_penalty.weight=3", *FAST, report=True)
    run = Path("runs/00000-ring-gradient_penalty")
    assert {p.name for p in run.iterdir()} == {
        "config.toml", "plugins.json", "env.json", "data.json", "stats.jsonl", "metrics.jsonl", "summary.json",
        "signals.jsonl", "samples", "curves.png", "report.html", "checkpoints",
    }  # fmt: skip
    assert json.loads((run / "plugins.json").read_text())["gradient_penalty"]["version"]
    assert '[options.gradient_penalty]\nweight = "3"\n' in (run / "config.toml").read_text()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [None, 4, 8, 12]
    assert metrics[0]["modes"] == 8
    assert metrics[0].keys() == metrics[1].keys() == {
        "step", "modes", "high_quality", "reverse_kl", "jsd", "sliced_wasserstein", "energy_distance"
    }  # fmt: skip
    stats = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in stats] == [3, 6, 9, 12]
    last = stats[-1]
    assert last["d_loss"] == pytest.approx(last["d_loss/adv"] + last["d_loss/gradient_penalty"])
    with Image.open(run / "samples" / "fakes-000012.png") as picture:
        assert picture.width > 300
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {
        "step-000005",
        "step-000012",
        "latest",
        "best",
    }
    assert "high quality" in result.output
    assert "fakes-000012.png" in result.output
    # the recorded configuration is one: it repeats the run bit for bit
    undrawn = gankit("run", "--config", str(run / "config.toml"), "--no-report", "--name", "again")
    assert "report: gankit report runs/again\n" in undrawn.output and "curves" not in undrawn.output
    assert {p.name for p in run.iterdir()} - {p.name for p in Path("runs/again").iterdir()} == {
        "curves.png", "report.html"
    }  # fmt: skip
    assert_equal_states(final_state(run), final_state(Path("runs/again")))


def test_gradient_shares_and_milliseconds_are_measured() -> None:
    gankit("run", "--plugin", "pairwise_gp", *FAST, "--steps", "50", "--log-every", "50")
    (row,) = [json.loads(line) for line in Path("runs/00000-ring-pairwise_gp/stats.jsonl").read_text().splitlines()]
    assert row["gradient_share/d/pairwise_gp"] > 0 and row["ms/pairwise_gp"] > 0


@pytest.mark.parametrize("name", ["none", *IN_TREE])
def test_a_continued_run_equals_one_that_never_stopped(name: str) -> None:
    on = [] if name == "none" else ["--plugin", name]
    on += [word for option in OPTIONS.get(name, ()) for word in ("-o", option)]
    if name in IMAGES:
        np.save("x.npy", np.random.default_rng(0).integers(0, 256, (40, 32, 32), dtype=np.uint8))
        on += ["--data", "x.npy"]
        Path("halves.py").write_text("def features(x): return x[:, 0, ::8, ::8].flatten(1)")
    gankit("run", *FAST, *on, "--name", "whole")
    parts = shutil.copytree("runs/whole", Path("runs/parts"), symlinks=True)
    for folder in (parts / "checkpoints").glob("step-*"):  # as if it had been killed after step 5 was saved
        if int(folder.name[5:]) > 5:
            shutil.rmtree(folder)
    (parts / "summary.json").unlink()
    gankit("resume", "parts")
    assert_equal_states(final_state(Path("runs/whole")), final_state(parts))
    whole, continued = ((Path("runs") / run / "metrics.jsonl").read_text() for run in ("whole", "parts"))
    assert whole == continued


def test_a_run_killed_at_ten_random_moments_ends_in_the_same_weights() -> None:
    settings = ["--plugin", "pairwise_gp", "--batch", "16", "--width", "8", "--steps", "800", "--save-every", "10",
                "--eval-every", "80", "--eval-samples", "50", "--keep", "3"]  # fmt: skip
    gankit("run", *settings, "--name", "whole")
    process = alone("run", *settings, "--name", "killed")
    checkpoints = Path("runs/killed/checkpoints")
    when = random.Random(0)
    for _ in range(10):
        before = {p.name for p in checkpoints.glob("step-*")}
        while process.is_alive() and {p.name for p in checkpoints.glob("step-*")} <= before:
            time.sleep(0.005)  # until it has got further than the last one
        time.sleep(when.uniform(0, 0.05))
        assert process.is_alive(), Path("output").read_text()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        process = alone("resume", "killed")
    process.join()
    assert process.exitcode == 0, Path("output").read_text()
    assert_equal_states(final_state(Path("runs/whole"), 800), final_state(Path("runs/killed"), 800))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_leaves_a_resumable_run(number: signal.Signals) -> None:
    never = ["--steps", "100000", "--save-every", "0", "--eval-every", "0"]
    process = alone("run", "--batch", "16", "--width", "8", *never, "--name", "stopped")
    while not Path("runs/stopped/stats.jsonl").exists():
        assert process.is_alive(), Path("output").read_text()
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(60)
    output = Path("output").read_text()
    assert process.exitcode == 128 + number
    assert "interrupted after step" in output
    assert "gankit resume runs/stopped" in output
    (checkpoint,) = Path("runs/stopped/checkpoints").glob("step-*")
    step = int(checkpoint.name[5:])
    gankit("resume", "stopped", "--steps", str(step + 5))
    assert Path(f"runs/stopped/checkpoints/step-{step + 5:06d}").is_dir()


def test_a_finished_run_is_left_alone_until_more_steps_are_asked_for() -> None:
    gankit("run", *FAST, "--name", "r")
    before = Path("runs/r/summary.json").read_text()
    assert "give --steps to go on" in gankit("resume", "r", code=2).output
    assert Path("runs/r/summary.json").read_text() == before
    gankit("resume", "r", "--steps", "14")
    assert "steps = 14" in Path("runs/r/config.toml").read_text()


def test_a_run_whose_continuation_was_killed_can_be_continued() -> None:
    gankit("run", "--name", "r", *FAST)
    run = Path("runs/r")
    config = run / "config.toml"
    config.write_text(config.read_text().replace("steps = 12", "steps = 14"))  # resume --steps 14, then kill -9
    gankit("resume", str(run))
    assert json.loads((run / "summary.json").read_text())["step"] == 14
    with held(run):
        assert "by another process" in gankit("resume", str(run), "--steps", "16", code=2).output


PEAK = """
from gankit import hookimpl

class Peak:
    @hookimpl
    def evaluate(self, step):
        return {"resolution": {4: 1.0, 8: 3.0, 12: 2.0, 16: 2.5}.get(step, 0.0)}
"""


def test_the_best_checkpoint_is_that_of_the_best_evaluation_in_a_continued_run_too() -> None:
    Path("peak.py").write_text(PEAK)  # "resolution" is what counts most
    gankit("run", "--plugin", "peak.py:Peak", *FAST, "--name", "r")
    best = Path("runs/r/checkpoints/best")
    assert best.readlink() == Path("step-000008")
    evaluated = json.loads(gankit("evaluate", "r", "--json").stdout)
    (row,) = [row for row in rows("metrics.jsonl") if row["step"] == 8]
    assert evaluated["step"] == 8
    assert evaluated["metrics"] == pytest.approx({key: value for key, value in row.items() if key != "step"})
    best.unlink()
    best.symlink_to("step-000005")  # as if it had been killed before the link
    gankit("resume", "r", "--steps", "16")
    assert best.readlink() == Path("step-000008")


def test_the_latest_checkpoints_and_the_best_are_kept() -> None:
    Path("peak.py").write_text(PEAK)
    gankit("run", "--plugin", "peak.py:Peak", *FAST, "--save-every", "2", "--eval-every", "2", "--keep", "1")
    (folder,) = Path("runs").glob("*/checkpoints")
    assert {p.name for p in folder.iterdir()} == {"step-000008", "step-000012", "latest", "best"}


@pytest.mark.parametrize("marker", ["trylast=True", "wrapper=True"])
def test_what_the_last_plugin_does_after_a_step_is_measured_and_saved(marker: str) -> None:
    Path("last.py").write_text(
        "import torch\n"
        "from gankit import hookimpl\n"
        "class Last:\n"
        f"    @hookimpl({marker})\n"
        "    @torch.no_grad()\n"
        "    def post_step(self, gan, step):\n"
        f"        {'done = yield' if 'wrapper' in marker else 'pass'}\n"
        "        for p in gan.sampled.parameters() if step == 12 else ():\n"
        "            p.zero_()\n"
        f"        {'return done' if 'wrapper' in marker else 'pass'}\n"
    )
    gankit("run", "--plugin", "last.py:Last", *FAST, "--name", "r")
    saved = final_state(Path("runs/r"))
    weights = {name: t for name, t in saved.items() if name.startswith("generator_ema/body.")}
    assert len(weights) == 8 and not any(t.any() for t in weights.values())
    assert rows("metrics.jsonl")[-1]["modes"] == 0  # all samples lie in the middle of the ring


def test_more_steps_stretch_the_decay_of_the_rates() -> None:
    settings = [*FAST, "--lr-g", "0.002", "--decay-from", "0.5", "--decay-to", "0", "--name", "r"]
    gankit("run", *settings)  # ends at a rate of 0
    gankit("resume", "r", "--steps", "36")
    rates = {row["step"]: row["lr_g"] for row in rows("stats.jsonl")}
    assert {step: rates[step] for step in (6, 12, 15, 18, 27, 36)} == pytest.approx(
        {6: 0.002, 12: 0.0, 15: 0.002, 18: 0.002, 27: 0.001, 36: 0.0}
    )


def test_a_run_goes_on_from_where_it_is_and_adds_up_its_seconds() -> None:
    gankit("run", *FAST, "--name", "r")
    assert "at step 12 already" in gankit("resume", "r", "--steps", "9", code=2).output
    summary = Path("runs/r/summary.json")
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "seconds": 1000.0}))
    gankit("resume", "r", "--steps", "13")
    again = json.loads(summary.read_text())
    assert 1000 < again["seconds"] < 1100 and again["stats"]["step"] == 12  # the last line of stats.jsonl


def test_options_of_a_loss_are_numbers() -> None:
    flags = ["--loss", "least-squares", "-o", "loss.a=-1", "-o", "loss.b=1", "-o", "loss.c=0"]
    gankit("run", *FAST, *flags, "--name", "r")
    assert "[options.loss]\na = -1.0\nb = 1.0\nc = 0.0\n" in Path("runs/r/config.toml").read_text()


def test_resume_refuses_other_data_and_other_networks() -> None:
    data = np.random.default_rng(0).normal(size=(50, 3))
    np.save("x.npy", data)
    Path("mine.py").write_text("from torch import nn\ndef g(z_dim): return nn.Linear(z_dim, 3)\n")
    gankit("run", "--data", "x.npy", "--generator", "mine.py:g", *FAST, "--name", "r")
    np.save("x.npy", np.concatenate([data, data[:5]]))
    assert "data.train.count: 45 -> 50" in gankit("resume", "r", "--steps", "14", code=2).output
    np.save("x.npy", data * 2)
    assert "data.train.std: " in gankit("resume", "r", "--steps", "14", code=2).output
    np.save("x.npy", data)
    Path("mine.py").write_text("from torch import nn\ndef g(z_dim): return nn.Linear(z_dim, 3)  # another\n")
    assert "networks.mine.py:g: " in gankit("resume", "r", "--steps", "14", code=2).output


def test_what_an_older_gankit_did_not_record_is_not_compared() -> None:
    gankit("run", *FAST, "--name", "r")
    file = Path("runs/r/checkpoints/latest/state.pt")
    state = torch.load(file, weights_only=True)
    for name in ("processes", "networks", "data"):
        del state["facts"][name]
    torch.save(state, file)
    gankit("resume", "r", "--steps", "14")


def test_what_changed_since_a_run_is_said_where_its_networks_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.py").write_text("from torch import nn\ndef g(z_dim): return nn.Linear(z_dim, 2)\n")
    gankit("run", "--plugin", "r1", "--generator", "mine.py:g", *FAST, "--name", "r")
    assert "warning" not in gankit("sample", "r").output
    Path("mine.py").write_text("from torch import nn\ndef g(z_dim): return nn.Sequential(nn.Linear(z_dim, 2))[0]\n")
    said = gankit("sample", "r").output
    assert re.search(r"warning: this has changed since runs/r was trained: networks\.mine\.py:g: ", said)
    Path("mine.py").write_text("from torch import nn\ndef g(z_dim): return nn.Sequential(nn.Linear(z_dim, 2))\n")
    assert "are not of these networks: " in gankit("evaluate", "r", code=2).output
    Path("mine.py").write_text("from torch import nn\ndef g(z_dim): return nn.Linear(z_dim, 2)\n")
    monkeypatch.setattr(plugins, "distribution_of", lambda entry_point: ("gankit-r1", "9.9"))
    assert re.search(r"warning: .*plugins\.r1\.version: '.+' -> '9\.9'", gankit("evaluate", "r").output)


def test_a_run_of_a_gpu_is_not_continued_without_one() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    gankit("run", *FAST, "--name", "r")
    config = Path("runs/r/config.toml")
    config.write_text(config.read_text().replace('device = "cpu"', 'device = "cuda"'))
    assert "was trained on a GPU, and none" in gankit("resume", "r", "--steps", "14", code=2).output


def test_resume_refuses_and_names_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    gankit("run", "--plugin", "gradient_penalty", *FAST, "--name", "r")
    config = Path("runs/r/config.toml")
    original = config.read_text()
    config.write_text(original.replace("batch = 16", "batch = 32"))
    message = gankit("resume", "r", "--steps", "20", code=2).output
    assert "config.batch: 16 -> 32" in message
    config.write_text(original)
    monkeypatch.setattr(plugins, "distribution_of", lambda entry_point: ("gankit-gradient-penalty", "9.9"))
    message = gankit("resume", "r", "--steps", "20", code=2).output
    assert re.search(r"plugins\.gradient_penalty\.version: '.+' -> '9\.9'", message)


def test_a_loss_that_is_not_finite_stops_with_step_and_term_and_keeps_the_last_good_checkpoint() -> None:
    Path("bad.py").write_text(
        "from gankit import hookimpl\n"
        "class Bad:\n"
        "    @hookimpl\n"
        "    def pre_d_loss(self, real_logits, step):\n"
        "        return {'bad': real_logits.mean() * (float('nan') if step == 8 else 0.0)}\n"
    )
    output = gankit("run", "--plugin", "./bad.py:Bad", *FAST, "--name", "r", code=1).output
    assert "step 8: term 'bad' of the discriminator's loss is nan" in output
    assert "step-000005" in output
    steps = sorted(p.name for p in Path("runs/r/checkpoints").glob("step-*"))
    assert steps[-1] == "step-000005"
    assert all(bool(t.isfinite().all()) for t in final_state(Path("runs/r"), 5).values() if t.is_floating_point())


def test_sample_and_evaluate() -> None:
    gankit("run", *FAST, "--name", "r")
    assert "64 samples: runs/r/samples.png" in gankit("sample", "r").output
    gankit("sample", "r", "-n", "10", "--to", "x.npy", "--seed", "1")
    gankit("sample", "r", "-n", "10", "--to", "x.csv", "--seed", "1")
    gankit("sample", "r", "-n", "10", "--to", "y.npz", "--seed", "2")
    x = np.load("x.npy")
    assert x.shape == (10, 2)
    np.testing.assert_allclose(np.loadtxt("x.csv", delimiter=","), x, rtol=1e-6)
    assert not np.array_equal(np.load("y.npz")["x"], x)
    recorded = json.loads(Path("runs/r/metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads(gankit("evaluate", "r", "--checkpoint", "latest", "--json").stdout)
    assert found["step"] == recorded.pop("step") == 12
    assert found["metrics"] == pytest.approx(recorded, rel=1e-6)
    assert found["truth"]["modes"] == 8
    gankit("sample", "r", "--to", "x.jpg", code=2)


MEASURING = """
from dataclasses import dataclass
import gankit

@dataclass(eq=False)
class Mean:
    times: float = 1.0

    @gankit.hookimpl
    def setup(self, gan):
        assert self.times != 13

    @gankit.hookimpl
    def evaluate(self, draw):
        return {"mean": self.times * float(draw(100).mean())}
"""


def test_evaluate_adds_plugins_that_measure_and_no_others() -> None:
    Path("own.py").write_text(MEASURING)
    gankit("run", *FAST, "--plugin", "r1", "--name", "r")
    plain = json.loads(gankit("evaluate", "r", "--json").stdout)["metrics"]
    once = json.loads(gankit("evaluate", "r", "--plugin", "own.py:Mean", "--json").stdout)
    twice = json.loads(gankit("evaluate", "r", "-p", "own.py:Mean", "-o", "mean.times=2", "--json").stdout)
    assert {name: value for name, value in once["metrics"].items() if name != "mean"} == plain
    assert twice["metrics"]["mean"] == pytest.approx(2 * once["metrics"]["mean"]) != 0
    assert twice["truth"]["mean"] == pytest.approx(2 * once["truth"]["mean"])
    gankit("run", *FAST, "--plugin", "own.py:Mean", "-o", "mean.times=3", "--name", "has-it")
    with_it = [json.loads(gankit("evaluate", "has-it", "--json", *new).stdout)["metrics"]["mean"]
               for new in ([], ["-p", "own.py:Mean"], ["-p", "own.py:Mean", "-o", "mean.times=6"])]  # fmt: skip
    assert with_it == pytest.approx([with_it[0], with_it[0] / 3, 2 * with_it[0]])
    for plugin, hooks in (("r2", "pre_d_loss"), ("r1", "pre_d_loss"), ("spectral_norm", "setup")):
        output = gankit("evaluate", "r", "--plugin", plugin, code=2).output
        assert f"plugin {plugin!r} acts on training" in output and hooks in output
    assert "no option 'time'" in gankit("evaluate", "r", "-p", "own.py:Mean", "-o", "mean.time=1", code=2).output
    assert "--plugin meen is not" in gankit("evaluate", "r", "-p", "own.py:Mean", "-o", "meen.a=1", code=2).output


def test_exported_weights_are_ordinary_ones_with_spectral_norm_folded_in() -> None:
    # of this seed's weights the second singular value is well below the first: 12 steps of power iteration are enough
    gankit("run", "--plugin", "spectral_norm", *FAST, "--seed", "4", "--name", "r")
    assert "runs/r/export/generator_ema.safetensors" in gankit("export", "r", "--checkpoint", "latest").output
    exported = safetensors.torch.load_file("runs/r/export/discriminator.safetensors")
    bare = networks.discriminator([(2,)], width=8)
    bare.load_state_dict(exported)  # the names are those of the bare network
    weight = exported["layers.hidden1.weight"].double().numpy()
    stored = safetensors.torch.load_file("runs/r/checkpoints/latest/discriminator.safetensors")
    original = stored["layers.hidden1.parametrizations.weight.original"].double().numpy()
    assert np.linalg.svd(original)[1][0] != pytest.approx(1, abs=0.05)
    assert np.linalg.svd(weight)[1][0] == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(weight / weight[0, 0], original / original[0, 0], rtol=1e-4)


def test_dry_run_writes_nothing_and_explain_shows_the_order() -> None:
    output = gankit("run", "--dry-run", "--plugin", "pairwise_gp", *FAST).output
    assert "encoder" in output
    output = gankit("explain", "--plugin", "gradient_penalty", "--plugin", "pairwise_gp", *FAST).output
    assert re.search(r"pre_d_loss +stats \( gradient_penalty -> pairwise_gp \)", output)
    assert re.search(r"view +pairwise_gp \( core \)", output)
    assert "then one G update:" in output
    output = gankit("explain", "--simultaneous", "--d-steps", "3", *FAST).output
    assert "3 D updates:" in output and "one G update, at once with D's last:" in output
    assert not Path("runs").exists()


def test_both_players_move_at_once_where_it_is_asked_for() -> None:
    for name, flags in (("turns", ()), ("once", ("--simultaneous",)), ("again", ("--config", "runs/once/config.toml"))):
        gankit("run", *FAST, *flags, "--name", name)
    turns, once, again = (
        Path("runs", name, "checkpoints/latest/generator.safetensors") for name in ("turns", "once", "again")
    )
    assert "simultaneous = true" in Path("runs/once/config.toml").read_text()
    assert once.read_bytes() == again.read_bytes() != turns.read_bytes()


def test_a_refused_run_leaves_no_folder() -> None:
    Path("refuses.py").write_text(
        "from gankit import UsageError, hookimpl\n"
        "class Refuses:\n"
        "    @hookimpl\n"
        "    def setup(self):\n"
        "        raise UsageError('it cannot be')\n"
    )
    assert "it cannot be" in gankit("run", "--plugin", "./refuses.py:Refuses", code=2).output
    assert not list(Path("runs").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--plugin", "pairwise_pg"], "did you mean 'pairwise_gp'"),
        (["run", "--plugin", "bigan", "-o", "bigan.encodr=x"], "did you mean 'encoder'"),
        (["run", "-o", "weight=3"], "plugin.option=value"),
        (["run", "--data", "rign"], "ring"),
        (["run", "--data", "~nobody-here/x"], "there is no file or folder"),
        (["run", "--data", "ring", "--data-root", "x"], "leave it out"),
        (["run", "--plugin", "~nobody-here/x.py:C"], "is no file"),
        (["run", "--data", os.fsdecode(b"caf\xe9")], "is not in UTF-8"),
        (["report", "\u00b2"], "no run"),
        (["bench", "quick", "--jobs", "\u00b2"], "--jobs takes a whole number"),
        (["run", "--set", "stepps=3"], "did you mean 'steps'"),
        (["run", "--steps", "many"], "steps must be whole number"),
        (["run", "--stepps", "3"], "--steps"),
        (["run", "--loss", "hing"], "loss must be"),
        (["run", "--loss", "hinge", "-o", "loss.a=1"], "hinge"),
        (["run", "--loss", "least-squares", "-o", "loss.a=x"], "loss.a must be number, not 'x'"),
        (["run", "--generator", "mine.py"], "give file.py:name or module:name"),
        (["run", "--plugin", "./mine:Class"], "give file.py:name or module:name"),
        (["run", "--plugin", ":Class"], "give file.py:name or module:name"),
        (["run", "--generator", "nowhere.py:g"], "nowhere.py"),
        (["rum"], "did you mean 'run'"),
        (["resume", "7"], "no run 7"),
        (["sample"], "no run"),
        (["plugins", "show", "bigann"], "did you mean 'bigan'"),
        (["run", "--config", "none.toml"], "cannot read"),
        (["run", "--device", "cuda"], "cpu"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence_with_exit_code_2(arguments: list[str], message: str) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    output = gankit(*arguments, code=2).output
    assert message in output
    assert "Traceback" not in output
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc, where not even root may write")
def test_a_file_that_cannot_be_written_is_named() -> None:
    gankit("run", *FAST, "--name", "r")
    assert "cannot read or write nowhere/x.png: " in gankit("sample", "r", "--to", "nowhere/x.png", code=2).output


def test_a_reader_that_has_seen_enough_hears_nothing_more() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "gankit", "plugins"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")  # as click's own commands end


def test_options_of_any_name_are_written_so_that_they_are_read_again() -> None:
    Path("own.py").write_text(
        "from dataclasses import dataclass\n@dataclass(eq=False)\nclass Gr\u00f6\u00dfe:\n    weight: float = 1\n"
        "    def __post_init__(self): pass\n    from gankit import hookimpl\n"
        "    @hookimpl\n    def setup(self): pass\n"
    )
    gankit("run", *FAST, "--plugin", "own.py:Gr\u00f6\u00dfe", "-o", "gr\u00f6\u00dfe.weight=3", "--name", "r")
    assert '[options."gr\u00f6\u00dfe"]\nweight = "3"' in Path("runs/r/config.toml").read_text()
    gankit("resume", "r", "--steps", "14")


def test_an_unwritable_folder_is_one_sentence() -> None:
    assert "cannot read or write /proc/runs" in gankit("run", "--out", "/proc/runs", *FAST, code=2).output


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_a_run_that_can_be_continued() -> None:
    code = (
        "import resource, sys\n"
        "from gankit.cli import main\n"
        "import gankit.rundir\n"
        "save = gankit.rundir.RunDir.save\n"
        "def full(self, weights, state, step):\n"
        "    if step > 5:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "    return save(self, weights, state, step)\n"
        "gankit.rundir.RunDir.save = full\n"
        f"main({['run', *FAST, '--name', 'r', '--eval-every', '0', '--no-report']!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.search(r"^gankit: cannot read or write .*: File too large$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    assert [p.name for p in sorted(Path("runs/r/checkpoints").iterdir())] == ["latest", "step-000005"]
    gankit("resume", "r")
    gankit("run", *FAST, "--name", "whole", "--eval-every", "0")
    assert_equal_states(final_state(Path("runs/whole")), final_state(Path("runs/r")))


def test_a_file_in_the_way_of_the_folder_is_one_sentence() -> None:
    Path("runs").write_text("")
    assert "runs" in gankit("run", *FAST, code=2).output


def test_settings_from_file_set_and_flags_in_this_order() -> None:
    Path("c.toml").write_text(
        'steps = 3\nbatch = 4\nlr-g = 0.5\nplugin = ["bigan"]\n[options.loss]\na = -1\nb = 1\nc = 0'
    )
    arguments = ["run", "--dry-run", "--json", "--config", "c.toml", "--set", "batch=5", "--set", "seed=9"]
    found = json.loads(gankit(*arguments, "--seed", "2", "--loss", "least-squares").stdout)
    expected = {"steps": 3, "batch": 5, "lr_g": 0.5, "seed": 2, "plugin": ["bigan"], "loss": "least_squares"}
    assert {key: found[key] for key in expected} == expected
    assert found["options"]["loss"] == {"a": -1, "b": 1, "c": 0}


def test_plugins_show() -> None:
    found = json.loads(gankit("plugins", "show", "gradient_penalty", "--json").stdout)
    assert found["options"]["weight"] == {"type": "number", "default": 10.0, "help": "lambda of eq. 3"}
    assert "1704.00028" in found["paper"]
    assert "x~" in gankit("plugins", "show", "pairwise_gp").output


def test_json_is_alone_on_standard_output() -> None:
    found = json.loads(gankit("run", *FAST, "--json").stdout)
    assert found["status"] == "finished"
    assert found["truth"]["modes"] == 8


def test_ones_own_networks_and_data() -> None:
    Path("mine.py").write_text(
        "import torch\n"
        "def generator(shape, z_dim): return torch.nn.Linear(z_dim, shape[0])\n"
        "class D(torch.nn.Linear):\n"
        "    def forward(self, *inputs): return super().forward(torch.cat(inputs, 1))\n"
        "def discriminator(shapes): return D(sum(s[0] for s in shapes), 1)\n"
        "def data(): return torch.rand(50, 3, generator=torch.Generator().manual_seed(0))\n"
    )
    gankit("run", "--data", "./mine.py:data", "--generator", "./mine.py:generator", "--discriminator",
           "./mine.py:discriminator", "--plugin", "bigan", *FAST)  # fmt: skip
    (run,) = Path("runs").iterdir()
    weights = safetensors.torch.load_file(run / "checkpoints" / "latest" / "discriminator.safetensors")
    assert weights["weight"].shape == (1, 3 + 64)


def test_a_discriminator_that_cannot_score_the_view_is_one_sentence() -> None:
    Path("mine.py").write_text("import torch\ndef d(): return torch.nn.Linear(2, 1)\n")
    output = gankit("run", "--discriminator", "./mine.py:d", "--plugin", "bigan", *FAST, code=2).output
    assert "tensors of shape (16, 2), (16, 1)" in output


def test_a_run_whose_plugin_is_gone_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    gankit("run", "--plugin", "r1", "--name", "r", *FAST)
    import gankit.run as running

    known = running.available()
    monkeypatch.setattr(running, "available", lambda: {name: ep for name, ep in known.items() if name != "r1"})
    for command in (["evaluate", "runs/r"], ["sample", "runs/r"], ["resume", "runs/r", "--steps", "20"]):
        result = gankit(*command, code=2)
        assert "runs/r was made with the plugin 'r1' (gankit-r1 0.1.0), which is not installed" in result.output


def test_a_plugin_knows_how_long_the_run_is() -> None:
    from gankit import GAN, hookimpl
    from gankit.testing import run

    class Schedule:
        seen: list[int | None] = []

        @hookimpl
        def setup(self, gan: GAN) -> None:
            self.seen.append(gan.steps)

        @hookimpl
        def post_step(self, gan: GAN) -> None:
            self.seen.append(gan.steps)

    run({"schedule": Schedule()}, steps=2)
    assert Schedule.seen == [None, 2, 2, 2, 2]  # a bare loop learns it when it trains; `gankit run` knows before
