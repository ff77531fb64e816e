"""What is logged is read back by TensorBoard itself."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gankit_tensorboard import TensorBoard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gankit import GAN, hookimpl, train
from gankit.cli import main
from gankit.testing import run, tiny_gan
from gankit.training import measure


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = read(folder)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class Brightness:
    """A metric of another plugin."""

    @hookimpl
    def evaluate(self, draw: object) -> dict[str, float]:
        return {"brightness": 0.25}


def test_terms_are_those_of_the_updates_and_of_several_the_last(tmp_path: Path) -> None:
    _, log = run({"tensorboard": TensorBoard(every=2, folder=str(tmp_path))}, steps=5, d_steps=3)
    found = scalars(tmp_path)
    by_step = {(phase, step): terms["adv"] for phase, step, terms in log.updates}  # later ones replace earlier ones
    assert found.keys() == {"d_loss/adv", "g_loss/adv"}
    for phase in "dg":
        assert dict(found[f"{phase}_loss/adv"]) == pytest.approx({step: by_step[phase, step] for step in (2, 4)})


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_metrics_of_all_and_a_picture_come_with_an_evaluation(kind: str, tmp_path: Path) -> None:
    plugins = {"tensorboard": TensorBoard(samples=4, folder=str(tmp_path)), "brightness": Brightness()}
    gan = tiny_gan(kind, plugins)
    gan.data = None
    assert measure(gan) == {"brightness": 0.25}  # before training: logged nowhere
    train(gan, 3)
    assert measure(gan) == {"brightness": 0.25}
    assert scalars(tmp_path)["metrics/brightness"] == [(3, 0.25)]
    (picture,) = read(tmp_path).Images("samples")
    assert picture.step == 3
    assert min(picture.width, picture.height) > 50


def test_nothing_changes(tmp_path: Path) -> None:
    plain, _ = run({}, steps=4)
    logged, _ = run({"tensorboard": TensorBoard(every=1, folder=str(tmp_path))}, steps=4)
    for network, tensors in plain.weights().items():
        assert all(torch.equal(tensor, logged.weights()[network][key]) for key, tensor in tensors.items())
    assert plain.rngs.keys() == logged.rngs.keys()


def test_without_a_folder_it_says_so_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run({"tensorboard": TensorBoard(every=1)}, steps=3)
    assert [str(w.message) for w in caught if "logs nothing" in str(w.message)] == [
        "tensorboard logs nothing: there is no run's folder, so set its option folder"
    ]


def test_of_several_processes_the_first_one_writes(tmp_path: Path) -> None:
    gan: GAN = tiny_gan(plugins={"tensorboard": TensorBoard(every=1, folder=str(tmp_path))})
    gan.rank = 1
    train(gan, 2)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_and_continued_has_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "run --plugin tensorboard -o tensorboard.every=2 --eval-every 3 --save-every 5"

    def gankit(text: str) -> None:
        result = CliRunner().invoke(main, text.split())
        assert result.exit_code == 0, (result.output, result.exception)

    gankit(f"{command} --eval-samples 40 --width 8 --keep 9 --steps 20 --no-report")
    folder = tmp_path / "runs" / "00000-ring-tensorboard"
    whole = scalars(folder / "tensorboard")
    text = read(folder / "tensorboard").Tensors("true data/text_summary")
    assert text[0].step == 0
    assert b"sliced_wasserstein" in text[0].tensor_proto.string_val[0]
    for checkpoint in (folder / "checkpoints").glob(
        "step-*"
    ):  # as if it had been killed late, and saved last at step 10
        if int(checkpoint.name[5:]) > 10:
            shutil.rmtree(checkpoint)
    (folder / "summary.json").unlink()
    gankit("resume --no-report")
    again = scalars(folder / "tensorboard")
    assert [step for step, _ in again["d_loss/adv"]] == list(range(2, 21, 2))
    assert [step for step, _ in again["metrics/sliced_wasserstein"]] == [3, 6, 9, 12, 15, 18, 20]
    assert whole.keys() == again.keys()
    for tag in whole:
        np.testing.assert_array_equal(again[tag], whole[tag])
    gankit("evaluate 0 -n 40")
    assert scalars(folder / "tensorboard").keys() == whole.keys()
    assert len(scalars(folder / "tensorboard")["metrics/sliced_wasserstein"]) == 7


@pytest.mark.parametrize("options", [{"every": 0}, {"samples": -1}])
def test_options_have_ranges(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        TensorBoard(**options)
