"""Whole runs on every kind of data: generated here, and the real MNIST and CIFAR-10 where GANKIT_DATA has them."""

import gzip
import json
import os
import struct
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from gankit.cli import main

FAST = ["--steps", "2", "--batch", "8", "--eval-samples", "20", "--eval-every", "0", "--save-every", "0",
        "--no-report"]  # fmt: skip
REAL = Path(os.environ.get("GANKIT_DATA", "nowhere"))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trained(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(main, ["run", *arguments, *FAST, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found: dict[str, object] = json.loads(result.stdout)
    assert found["status"] == "finished"
    assert sorted(Path(str(found["run"]), "samples").glob("fakes-*.png"))
    return found


def idx(path: Path, array: np.ndarray) -> None:
    """An IDX file as MNIST's: magic number 0, 0, 8 (unsigned bytes), dimensions, sizes, bytes."""
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Files of MNIST's names and format, with a few random digits."""
    folder, random = tmp_path / "root" / "mnist", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part, n in (("train", 40), ("t10k", 30)):
        idx(folder / f"{part}-images-idx3-ubyte.gz", random.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        idx(folder / f"{part}-labels-idx1-ubyte.gz", random.integers(0, 10, n, dtype=np.uint8))
    return folder.parent


@pytest.mark.parametrize("name", ["mnist", "stacked-mnist"])
def test_digits_in_the_original_format(name: str, digits: Path) -> None:
    trained("--data", name, "--data-root", str(digits), "--width", "4", "--plugin", "pairwise_gp")


def test_a_zip_of_images_in_class_folders() -> None:
    random = np.random.default_rng(0)
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for i in range(30):
            buffer = BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
            archive.writestr(f"{'cat' if i % 2 else 'dog'}/{i}.png", buffer.getvalue())
    found = trained("--data", "photos.zip", "--width", "4", "--plugin", "gradient_penalty", "--loss", "wasserstein")
    assert Path(str(found["run"])).name == "00000-photos-gradient_penalty"


def test_arrays_and_tables() -> None:
    random = np.random.default_rng(0)
    np.save("x.npy", random.normal(size=(60, 5)).astype(np.float32))
    np.savetxt("x.csv", random.normal(size=(60, 3)), delimiter=",", header="a,b,c", comments="")
    for name in ("x.npy", "x.csv"):
        trained("--data", name, "--width", "8")


@pytest.mark.parametrize("name", ["grid", "gaussians1200"])
def test_mixtures(name: str) -> None:
    found = trained("--data", name, "--width", "8")
    assert isinstance(found["truth"], dict)
    assert found["truth"]["modes"] >= 4  # 20 true samples


def test_other_networks(digits: Path) -> None:
    trained("--data", "mnist", "--data-root", str(digits), "--network", "mlp", "--width", "8")
    trained("--data", "mnist", "--data-root", str(digits), "--network", "resnet", "--width", "4")


@pytest.mark.skipif(not (REAL / "mnist").is_dir(), reason="GANKIT_DATA names no folder with mnist/ in it")
def test_the_real_mnist() -> None:
    trained("--data", "mnist", "--plugin", "pairwise_gp", "--width", "4")


@pytest.mark.skipif(
    not (REAL / "cifar10-test.zip").is_file(), reason="GANKIT_DATA names no folder with cifar10-test.zip"
)
def test_real_photographs() -> None:
    data = str(REAL / "cifar10-test.zip")
    trained("--data", data, "--plugin", "gradient_penalty", "--loss", "wasserstein", "--width", "4")
