"""Data sets: definitions against closed forms, readers against hand-made files, errors by their sentences."""

import gzip
import hashlib
import io
import math
import os
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import stats

import gankit.data.digits as digits_module
from gankit.data import NAMES, Dataset, Modes, Store, from_arrays, load, summary
from gankit.errors import UsageError

CEILING = 1 - math.exp(-4.5)


# --- what every data set promises ---------------------------------------------------------------------------


def test_names_of_the_interface():
    assert NAMES == ("ring", "grid", "gaussians1200", "heavy-mode", "mnist", "stacked-mnist")


def test_split_is_a_fixed_tenth_and_loses_nothing(tmp_path):
    x = np.arange(250, dtype=np.float32)[:, None]
    np.save(tmp_path / "x.npy", x)
    data = load(str(tmp_path / "x.npy"))
    train, held = data.batch(torch.arange(len(data))), data.held_out(10_000)
    assert (len(data), len(held)) == (225, 25)
    assert sorted(torch.cat([train, held]).flatten().tolist()) == x[:, 0].tolist()
    assert held.flatten().tolist() != sorted(held.flatten().tolist())  # spread at random, not the file's tail
    again = load(str(tmp_path / "x.npy"))
    assert torch.equal(again.held_out(7), held[:7])
    assert data.held_out(0).shape == (0, 1)
    with pytest.raises(UsageError, match="0 or more, not -1"):
        data.held_out(-1)


@pytest.mark.parametrize(("count", "held"), [(2, 1), (9, 1), (20, 2), (150_000, 10_000)])
def test_size_of_the_held_out_part(count, held):
    data = from_arrays("x", np.zeros((count, 1), np.float32))
    assert (len(data), len(data.test)) == (count - held, held)


def test_loading_leaves_the_global_generator_alone(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((50, 2)))
    state = torch.random.get_rng_state()
    load("ring")
    summary(load(str(tmp_path / "x.npy")))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batch_gathers_in_the_order_of_the_index_and_never_aliases():
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    data = from_arrays("x", x)
    first = data.batch(torch.tensor([3, 0, 3]))
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    first.zero_()
    assert data.batch(torch.tensor([3]))[0].tolist() != [0, 0]
    assert x[1].tolist() == [2, 3]


def test_to_moves_everything_and_shares_what_was_shared():
    data = from_arrays("x", np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 2)
    moved = data.to("meta")
    assert moved.device.type == moved.labels.device.type == moved.held_out_labels.device.type == "meta"
    assert moved.train.items is moved.test.items
    assert data.device.type == "cpu"
    modes = Modes(torch.zeros(3, 2), 0.1, 0.3)
    assert Dataset("m", data.train, data.test, modes=modes).to("meta").modes.centers.device.type == "meta"
    assert torch.equal(data.to("cpu").batch(torch.arange(5)), data.batch(torch.arange(5)))


def test_stacked_store_puts_rows_into_channels():
    items = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    store = Store(items, torch.tensor([[3, 0, 1], [2, 2, 2]]))
    assert (len(store), store.shape) == (2, (3, 2, 2))
    assert store.raw(torch.tensor([1, 0]))[:, :, 0, 0].tolist() == [[2, 2, 2], [3, 0, 1]]


# --- mixtures -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["ring", "grid", "gaussians1200"])
def mixture(request):
    """Name and data; one load per set, since the largest takes half a gigabyte."""
    return request.param, load(request.param)


def sample(data):
    """20,000 samples in 2-D, 5,000 in 1200-D, with their labels."""
    n = 20_000 if data.shape == (2,) else 5000
    return data.batch(torch.arange(n)).numpy().astype(np.float64), data.labels[:n].numpy()


def test_mixture_sizes_and_modes(mixture):
    name, data = mixture
    count, dim = {"ring": (8, 2), "grid": (25, 2), "gaussians1200": (10, 1200)}[name]
    assert (len(data), len(data.test), data.shape) == (100_000, 10_000, (dim,))
    assert data.modes.centers.shape == (count, dim)
    assert data.modes.centers.dtype == torch.float32
    assert not data.is_image
    assert len(data.classes) == count
    assert data.labels.dtype == torch.int64


def test_mixture_centres(mixture):
    name, data = mixture
    centers = data.modes.centers.numpy()
    if name == "ring":
        roots = np.exp(2j * np.pi * np.arange(8) / 8)
        np.testing.assert_allclose(centers, np.stack([roots.real, roots.imag], 1), atol=1e-7)
    elif name == "grid":
        assert {tuple(c) for c in centers.tolist()} == {(i, j) for i in range(-4, 5, 2) for j in range(-4, 5, 2)}
    else:
        assert centers[:, 0].tolist() == [-1, -0.5, 0, 0.5, -2, -2.5, 10, 0.25, -13, -5.5]
        assert (centers == centers[:, :1]).all()


def test_mixture_weights_are_equal_and_drawn_at_random(mixture):
    _, data = mixture
    counts = np.bincount(data.labels.numpy())
    assert stats.chisquare(counts).pvalue > 1e-4
    assert len(set(counts.tolist())) > 1


def test_mixture_noise(mixture):
    name, data = mixture
    (x, labels), noisy = sample(data), 700 if name == "gaussians1200" else 2
    std = {"ring": 0.01, "grid": 0.05, "gaussians1200": 1.0}[name]
    assert data.modes.std == std
    noise = x - data.modes.centers.numpy()[labels]
    assert np.abs(noise[:, noisy:]).max(initial=0) == 0
    scaled = noise[:, :noisy] / std
    assert abs(scaled.mean()) < 5 / math.sqrt(scaled.size)
    assert abs(scaled.var() - 1) < 5 * math.sqrt(2 / scaled.size)
    assert abs(np.corrcoef(scaled[:, 0], scaled[:, 1])[0, 1]) < 5 / math.sqrt(len(x))
    assert stats.kstest(scaled[:, -1], "norm").pvalue > 1e-4


def test_mixture_radius_accepts_98_89_percent(mixture):
    name, data = mixture
    noisy = 700 if name == "gaussians1200" else 2
    assert data.modes.radius == pytest.approx(data.modes.std * math.sqrt(stats.chi2.ppf(CEILING, noisy)))
    if noisy == 2:
        assert data.modes.radius == pytest.approx(3 * data.modes.std)
    (x, labels), centers = sample(data), data.modes.centers.numpy().astype(np.float64)
    nearest = np.full(len(x), np.inf)
    mode = np.zeros(len(x), int)
    for k, center in enumerate(centers):
        distance = np.linalg.norm(x - center, axis=1)
        mode[distance < nearest] = k
        nearest = np.minimum(nearest, distance)
    assert (mode == labels).all()
    share = (nearest <= data.modes.radius).mean()
    assert abs(share - CEILING) < 5 * math.sqrt(CEILING * (1 - CEILING) / len(x))


def test_mixture_is_the_same_every_time_and_held_out_is_not_in_training(mixture):
    name, data = mixture
    again = load(name) if name != "gaussians1200" else data  # half a gigabyte: once is enough
    assert torch.equal(again.batch(torch.arange(100)), data.batch(torch.arange(100)))
    seen = {row.tobytes() for row in data.batch(torch.arange(5000)).numpy()}
    assert not seen & {row.tobytes() for row in data.held_out(5000).numpy()}
    centers = data.modes.centers[data.held_out_labels[:5000]]
    assert (data.held_out(5000) - centers).norm(dim=1).max() < 2 * data.modes.radius


# --- MNIST --------------------------------------------------------------------------------------------------


def write_idx(path, array):
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """A folder with a small MNIST: 40 train and 12 test digits, two of the files gzipped."""
    monkeypatch.delenv("GANKIT_DATA", raising=False)
    rng = np.random.default_rng(5)
    folder = tmp_path / "root" / "mnist"
    folder.mkdir(parents=True)
    made = {}
    for part, count, suffix in (("train", 40, ".gz"), ("t10k", 12, "")):
        made[part] = (
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            np.arange(count, dtype=np.uint8) % 10,
        )
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", made[part][0])
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", made[part][1])
    return tmp_path / "root", made


def no_download():
    raise ImportError("no pooch in this test")


def test_mnist_reads_images_and_labels(digits):
    root, made = digits
    for where in (root, root / "mnist"):
        data = load("mnist", data_root=str(where))
        assert (len(data), data.shape, data.is_image) == (40, (1, 28, 28), True)
        got = data.batch(torch.tensor([7, 0])).numpy()
        np.testing.assert_allclose(got[:, 0], made["train"][0][[7, 0]] / 127.5 - 1, atol=1e-6)
        assert data.labels.tolist() == made["train"][1].tolist()
        assert data.classes == tuple("0123456789")


def test_mnist_held_out_are_the_test_digits_shuffled_with_their_labels(digits):
    root, made = digits
    data = load("mnist", data_root=str(root))
    raw = ((data.held_out(12).numpy()[:, 0] + 1) * 127.5).round().astype(np.uint8)
    where = [next(i for i, image in enumerate(made["t10k"][0]) if (image == got).all()) for got in raw]
    assert sorted(where) == list(range(12))
    assert where != list(range(12))
    assert data.held_out_labels.tolist() == made["t10k"][1][where].tolist()


def test_mnist_found_through_the_environment(digits, monkeypatch):
    monkeypatch.setenv("GANKIT_DATA", str(digits[0]))
    assert len(load("mnist")) == 40
    assert len(load("mnist", data_root="/nowhere")) == 40


def test_mnist_missing_names_files_places_and_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_module, "_download", no_download)
    monkeypatch.setenv("GANKIT_DATA", str(tmp_path / "env"))
    with pytest.raises(UsageError) as caught:
        load("mnist", data_root=str(tmp_path / "root"))
    message = str(caught.value)
    for part in (*digits_module.FILES, "GANKIT_DATA", 'pip install "gankit[download]"'):
        assert part in message
    for place in ("root", "root/mnist", "env", "env/mnist"):
        assert str(tmp_path / place) in message
    assert "\n" not in message
    monkeypatch.delenv("GANKIT_DATA")
    with pytest.raises(UsageError, match="nowhere"):
        load("stacked-mnist")


def test_mnist_failed_download_is_told(monkeypatch):
    def offline():
        raise OSError("no route to host")

    monkeypatch.delenv("GANKIT_DATA", raising=False)
    monkeypatch.setattr(digits_module, "_download", offline)
    with pytest.raises(UsageError, match="no route to host"):
        load("mnist")


def test_mnist_download_checks_sums_and_caches(digits, tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch", reason="pooch is not installed; it is in gankit[download]")
    source = digits[0] / "mnist"
    sums = {}
    for name in digits_module.FILES:
        file = source / f"{name}.gz"
        if not file.exists():
            file.write_bytes(gzip.compress((source / name).read_bytes()))
        sums[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    fetched = []

    def copy(url, output_file, _pooch):
        fetched.append(url)
        Path(output_file).write_bytes((source / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr(pooch.core, "choose_downloader", lambda *_, **__: copy)
    monkeypatch.setenv("GANKIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="does not match"):  # our files are not the real ones
        load("mnist")
    monkeypatch.setattr(digits_module, "FILES", sums)
    fetched.clear()
    assert len(load("mnist")) == 40
    assert [url.rsplit("/", 1)[1] for url in fetched] == [f"{name}.gz" for name in sums]
    fetched.clear()
    assert len(load("mnist")) == 40
    assert fetched == []


@pytest.mark.parametrize("how", ["cut", "magic", "not gzip", "mismatch"])
def test_mnist_broken_files(digits, how):
    root, _ = digits
    file = root / "mnist" / "t10k-images-idx3-ubyte"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif how == "magic":
        file.write_bytes(b"hello" + file.read_bytes())
    elif how == "not gzip":
        (root / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(b"hello")
    else:
        write_idx(root / "mnist" / "t10k-labels-idx1-ubyte", np.zeros(5, np.uint8))
    with pytest.raises(UsageError, match="fetch"):
        load("mnist", data_root=str(root))


def test_mnist_at_another_size(digits):
    data = load("mnist", data_root=str(digits[0]), image_size=32)
    assert data.shape == (1, 32, 32)
    assert data.held_out(3).shape == (3, 1, 32, 32)
    assert load("stacked-mnist", data_root=str(digits[0]), image_size=16).shape == (3, 16, 16)


def test_stacked_mnist_assembles_its_digits(digits):
    root, made = digits
    data = load("stacked-mnist", data_root=str(root))
    assert (len(data), len(data.test), data.shape) == (128_000, 26_000, (3, 28, 28))
    assert data.labels is None
    assert data.classes == ()
    assert data.digits.shape == (128_000, 3)
    index = torch.tensor([5, 127_999, 64_000])
    rows = data.train.rows[index].numpy()
    np.testing.assert_allclose(data.batch(index).numpy(), made["train"][0][rows] / 127.5 - 1, atol=1e-6)
    assert data.digits[index].tolist() == made["train"][1][rows].tolist()
    held = ((data.held_out(2)[:, :, 0, :3].numpy() + 1) * 127.5).round()
    tests = {tuple(row) for row in made["t10k"][0][:, 0, :3].tolist()}
    assert {tuple(int(v) for v in row) for row in held.reshape(-1, 3)} <= tests
    size = data.train.items.nbytes + data.train.rows.nbytes
    assert size < 128_000 * 3 * 28 * 28 / 10  # indices, not images


def test_stacked_channels_are_independent_and_uniform_over_images(digits):
    rows = load("stacked-mnist", data_root=str(digits[0])).train.rows.numpy()
    assert stats.chisquare(np.bincount(rows.ravel(), minlength=40)).pvalue > 1e-4
    table = np.zeros((40, 40))
    np.add.at(table, (rows[:, 0], rows[:, 1]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


# --- folders and archives of images -------------------------------------------------------------------------


def make_images(root, names, size=(8, 8), mode="RGB", seed=0):
    rng = np.random.default_rng(seed)
    made = {}
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
        made[name] = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(made[name]).save(path)
    return made


def all_raw(data):
    x = torch.cat([data.batch(torch.arange(len(data))), data.held_out(10_000)]).numpy()
    return ((x + 1) * 127.5).round().astype(np.uint8)


def test_folder_classes_pixels_and_case(tmp_path):
    names = [f"dog/{i}.PNG" for i in range(6)] + [f"cat/deep/er/{i}.png" for i in range(5)] + ["cat/x.bmp"]
    made = make_images(tmp_path, names)
    for junk in ("cat/.hidden.png", ".git/a.png", "__MACOSX/cat/._0.png", "cat/notes.txt"):
        (tmp_path / junk).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / junk).write_bytes(b"not an image")
    data = load(str(tmp_path))
    assert (len(data), len(data.test), data.shape) == (11, 1, (3, 8, 8))
    assert data.classes == ("cat", "dog")
    assert data.notes == ()
    kind = {image.tobytes(): name.split("/")[0] for name, image in made.items()}
    labels = torch.cat([data.labels, data.held_out_labels]).tolist()
    raw = all_raw(data)
    assert {image.transpose(1, 2, 0).tobytes() for image in raw} == set(kind)
    assert [kind[image.transpose(1, 2, 0).tobytes()] for image in raw] == [data.classes[k] for k in labels]


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["a.png", "b.png"], ()),
        (["one/a.png", "one/b.png"], ("one",)),
        (["top/cat/a.png", "top/dog/b.png"], ("cat", "dog")),
        (["top/in/cat/a.png", "top/in/dog/b.png"], ("cat", "dog")),
        (["cat/x/a.png", "dog/b.png"], ("cat", "dog")),
        (["cat/a.png", "b.png"], ()),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_class_folders(tmp_path, names, classes, zipped):
    make_images(tmp_path / "set", names)
    path = tmp_path / "set"
    if zipped:
        path = tmp_path / "set.ZIP"
        with zipfile.ZipFile(path, "w") as archive:
            for name in [*names]:
                archive.write(tmp_path / "set" / name, name)
            archive.writestr("__MACOSX/cat/._a.png", b"junk")
    data = load(str(path))
    assert data.classes == classes
    assert (data.labels is None) == (classes == ())
    assert any("no classes" in note for note in data.notes) == (names == ["cat/a.png", "b.png"])


def test_train_and_test_folders_are_pointed_out(tmp_path):
    make_images(tmp_path, ["train/a/1.png", "train/b/1.png", "test/a/1.png"])
    assert any("train" in line and "name its folder" in line for line in summary(load(str(tmp_path))).warnings)


def test_all_suffixes_are_read(tmp_path):
    names = ["a.png", "b.jpg", "c.JPEG", "d.bmp", "e.gif", "f.webp"]
    make_images(tmp_path, names)
    data = load(str(tmp_path))
    assert len(data) + len(data.test) == len(names)


def test_grey_images_stay_grey_and_one_colour_image_makes_all_rgb(tmp_path):
    grey = make_images(tmp_path, ["a.png", "b.gif", "c.png"], mode="L")
    data = load(str(tmp_path))
    assert data.shape == (1, 8, 8)
    assert {image.tobytes() for image in all_raw(data)} == {image.tobytes() for image in grey.values()}
    make_images(tmp_path, ["d.png"])
    assert load(str(tmp_path)).shape == (3, 8, 8)


def test_alpha_is_dropped_and_palettes_and_16_bit_are_understood(tmp_path):
    colour = np.array([10, 200, 30, 0], np.uint8)
    Image.fromarray(np.broadcast_to(colour, (4, 4, 4)).copy()).save(tmp_path / "rgba.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "p.png", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(str(tmp_path))
    assert (all_raw(data) == np.array([10, 200, 30])[:, None, None]).all()
    deep = tmp_path / "deep"
    deep.mkdir()
    for i, value in enumerate((0, 257 * 100, 65535)):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(deep / f"{i}.png")
    assert sorted(all_raw(load(str(deep)))[:, 0, 0, 0].tolist()) == [0, 100, 255]


def test_photographs_are_turned_upright(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 4:] = 255  # right half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: white at the bottom
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    data = load(str(tmp_path), image_size=4)
    assert any("4x8" in note for note in load(str(tmp_path)).notes)
    image = all_raw(data)[0, 0]
    assert image[0].max() < 60
    assert image[-1].min() > 195


def test_equal_squares_keep_their_size_and_others_become_32_with_a_warning(tmp_path):
    make_images(tmp_path, ["a.png", "b.png"], size=(12, 12))
    assert load(str(tmp_path)).shape == (3, 12, 12)
    assert load(str(tmp_path)).notes == ()
    make_images(tmp_path, ["c.png"], size=(50, 40))
    data = load(str(tmp_path))
    assert data.shape == (3, 32, 32)
    assert any("2 different sizes" in line and "image_size" in line for line in summary(data).warnings)
    large = tmp_path / "large"
    make_images(large, ["a.png", "b.png"], size=(65, 65))
    assert load(str(large)).shape == (3, 32, 32) and any("65x65" in note for note in load(str(large)).notes)
    assert load(str(large), image_size=65).shape == (3, 65, 65)
    wide = tmp_path / "wide"
    make_images(wide, ["a.png", "b.png"], size=(50, 40))
    assert load(str(wide)).shape == (3, 32, 32)
    assert any("50x40" in note for note in load(str(wide)).notes)


def test_image_size_wins_and_enlarging_is_told(tmp_path):
    make_images(tmp_path, ["a.png", "b.png"], size=(12, 10))
    assert load(str(tmp_path), image_size=8).shape == (3, 8, 8)
    assert load(str(tmp_path), image_size=8).notes == ()
    assert any("2 of the 2 images" in note for note in load(str(tmp_path), image_size=11).notes)
    with pytest.raises(UsageError, match="image_size must be 1"):
        load(str(tmp_path), image_size=0)


def test_centre_crop_and_antialiasing(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255
    pixels[:, 20:60][::2] = 0  # fine stripes must average out, not alias
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    inner = all_raw(load(str(tmp_path), image_size=10))[0][:, 2:-2, :]
    assert 115 < inner.min() <= inner.max() < 140


def test_zip_equals_folder_and_decodes_jpeg_like_pillow(tmp_path):
    make_images(tmp_path / "set", [f"{c}/{i}.jpg" for c in "ab" for i in range(10)])
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted((tmp_path / "set").rglob("*.jpg"), reverse=True):
            archive.write(file, f"set/{file.relative_to(tmp_path / 'set')}")
    folder, zipped = load(str(tmp_path / "set")), load(str(tmp_path / "set.zip"))
    index = torch.arange(len(folder))
    assert torch.equal(folder.batch(index), zipped.batch(index))
    assert torch.equal(folder.held_out(5), zipped.held_out(5))
    assert torch.equal(folder.labels, zipped.labels)
    direct = {np.asarray(Image.open(f)).tobytes() for f in (tmp_path / "set").rglob("*.jpg")}
    assert {image.transpose(1, 2, 0).tobytes() for image in all_raw(folder)} == direct


def test_progress_reaches_the_total(tmp_path):
    make_images(tmp_path, [f"{i}.png" for i in range(5)])
    calls = []
    load(str(tmp_path), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 5) for i in range(1, 6)]


def test_a_class_whose_name_is_no_utf8_is_refused(tmp_path):
    make_images(tmp_path, [f"{os.fsdecode(b'caf' + bytes([0xE9]))}/a.png", "dog/b.png"])
    with pytest.raises(UsageError, match=r"'caf\\udce9' is not in UTF-8"):
        load(str(tmp_path))


def test_unreadable_images_are_named(tmp_path):
    make_images(tmp_path, ["cat/good.png", "dog/good.png"], size=(64, 64))
    (tmp_path / "cat" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"cat/bad\.png"):
        load(str(tmp_path))
    content = (tmp_path / "cat" / "good.png").read_bytes()
    (tmp_path / "cat" / "bad.png").write_bytes(content[: len(content) // 2])  # the header is fine
    with pytest.raises(UsageError, match=r"cat/bad\.png.*remove or replace"):
        load(str(tmp_path))


def test_nothing_to_read(tmp_path):
    with pytest.raises(UsageError, match="no image"):
        load(str(tmp_path))
    make_images(tmp_path, ["only.png"])
    with pytest.raises(UsageError, match="at least 2"):
        load(str(tmp_path))
    (tmp_path / "bad.zip").write_bytes(b"hello")
    with pytest.raises(UsageError, match="zip"):
        load(str(tmp_path / "bad.zip"))
    with pytest.raises(UsageError, match="single image"):
        load(str(tmp_path / "only.png"))


def test_images_that_cannot_fit_into_memory_are_refused_before_decoding(tmp_path, monkeypatch):
    make_images(tmp_path, ["a.png", "b.png"], size=(64, 64))
    monkeypatch.setattr(os, "sysconf", lambda name: 100 if name == "SC_PAGE_SIZE" else 250, raising=False)
    with pytest.raises(UsageError, match="smaller image_size"):
        load(str(tmp_path))
    assert load(str(tmp_path), image_size=16).shape == (3, 16, 16)


def test_linked_folders_are_followed_once(tmp_path):
    make_images(tmp_path / "elsewhere", ["a.png", "b.png"])
    root = tmp_path / "root"
    make_images(root / "dog", ["c.png"])
    try:
        (root / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (root / "dog" / "loop").symlink_to(root, target_is_directory=True)
    except OSError:
        pytest.skip("this file system has no symbolic links")
    data = load(str(root))
    assert len(data) + len(data.test) == 3
    assert data.classes == ("cat", "dog")


# --- arrays -------------------------------------------------------------------------------------------------


def saved(tmp_path, x):
    np.save(tmp_path / "x.npy", x)
    return str(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6,), (1,)),
        ((6, 5), (5,)),
        ((6, 4, 5), (1, 4, 5)),
        ((6, 3, 4, 5), (3, 4, 5)),
        ((6, 7, 5, 3), (3, 7, 5)),
        ((6, 7, 5, 1), (1, 7, 5)),
        ((6, 7, 5, 4), (4, 7, 5)),
        ((6, 3, 5, 3), (3, 5, 3)),
        ((6, 2, 5, 5), (2, 5, 5)),
    ],
)
def test_array_shapes(tmp_path, shape, expected):
    data = load(saved(tmp_path, np.random.default_rng(0).uniform(-1, 1, shape)))
    assert data.shape == expected
    assert data.batch(torch.arange(2)).shape == (2, *expected)


@pytest.mark.parametrize("shape", [(), (3, 0), (2, 2, 2, 2, 2)])
def test_array_shapes_that_are_refused(tmp_path, shape):
    with pytest.raises(UsageError, match="shape"):
        load(saved(tmp_path, np.zeros(shape)))


def test_channels_last_are_moved_not_reshaped(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 5, 7, 3), dtype=np.uint8)
    assert {image.tobytes() for image in all_raw(load(saved(tmp_path, x)))} == {
        image.transpose(2, 0, 1).tobytes() for image in x
    }


@pytest.mark.parametrize(
    ("low", "high", "dtype", "expected", "noted"),
    [
        (0, 255, np.uint8, (-1, 1), False),
        (0, 255, np.int64, (-1, 1), False),
        (0, 1, np.float32, (-1, 1), False),
        (0.25, 0.75, np.float16, (-0.5, 0.5), False),
        (-1, 1, np.float64, (-1, 1), False),
        (-0.5, 0.25, np.float64, (-0.5, 0.25), False),
        (0, 255, np.float64, (-1, 1), True),
        (51, 204, np.float32, (-0.6, 0.6), True),
        (-10, 30, np.float64, (-1, 1), True),
        (0, 1000, np.uint16, (-1, 1), True),
        (0, 1, np.uint16, (-1, 1), False),
        (0, 1, np.bool_, (-1, 1), False),
    ],
)
def test_image_values_are_mapped(tmp_path, low, high, dtype, expected, noted):
    x = np.linspace(low, high, 6 * 16).reshape(6, 4, 4)
    x = (x > 0.5) if dtype == np.bool_ else x.astype(dtype)
    before = x.copy()
    data = from_arrays("x", x)
    values = torch.cat([data.batch(torch.arange(len(data))), data.held_out(9)])
    assert (float(values.min()), float(values.max())) == pytest.approx(expected, abs=1e-3)
    assert bool(data.notes) == noted
    assert (x == before).all()  # the caller's array is not written to


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.int32, np.uint8]),
        hnp.array_shapes(min_dims=3, max_dims=4, min_side=2, max_side=5),
        elements={"min_value": 0, "max_value": 200},
    )
)
def test_any_finite_image_array_ends_in_minus_one_to_one(x):
    data = from_arrays("x", x)
    values = torch.cat([data.batch(torch.arange(len(data))), data.held_out(len(x))])
    assert values.dtype == torch.float32
    assert len(values) == len(x)
    assert values.abs().max() <= 1


def test_vectors_stay_as_they_are(tmp_path):
    x = np.array([[0, 300], [7, -2], [1, 1]], np.int16)
    data = load(saved(tmp_path, x))
    assert sorted(all_values(data)) == sorted(x.astype(float).tolist())


def all_values(data):
    return torch.cat([data.batch(torch.arange(len(data))), data.held_out(10_000)]).tolist()


@pytest.mark.parametrize("dtype", [object, "U3", np.complex64])
def test_arrays_that_are_not_numbers(tmp_path, dtype):
    with pytest.raises(UsageError, match="numbers"):
        load(saved(tmp_path, np.array([["1", "2"], ["3", "4"]]).astype(dtype)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_refused_with_their_place(tmp_path, bad):
    x = np.zeros((9, 4))
    x[5, 2] = x[7, 0] = bad
    with pytest.raises(UsageError, match=r"2 value\(s\).*index \(5, 2\)"):
        load(saved(tmp_path, x))
    if bad != 1e300:
        with pytest.raises(UsageError, match=r"index \(5, 0, 0, 2\)"):
            load(saved(tmp_path, x.reshape(9, 1, 1, 4)))


def test_npz_keys_and_labels(tmp_path):
    x, y = np.arange(24.0).reshape(12, 2), np.arange(12) % 3 + 5
    file = tmp_path / "d.npz"
    for keys in ({"whatever": x}, {"x": x, "z": y}, {"data": x, "a": y}, {"images": x, "b": y}):
        np.savez(file, **keys)
        assert load(str(file)).shape == (2,)
        assert load(str(file)).labels is None
    for keys in ({"x": x, "y": y}, {"anything": x, "labels": y[:, None]}):
        np.savez(file, **keys)
        data = load(str(file))
        assert data.classes == ("5", "6", "7")
        assert data.labels.tolist() == [int(row[0] // 2 % 3) for row in data.batch(torch.arange(len(data))).tolist()]
    np.savez(file, first=x, second=x)
    with pytest.raises(UsageError, match="first, second"):
        load(str(file))
    np.savez(file, y=y)
    with pytest.raises(UsageError, match="x, data, images"):
        load(str(file))


@pytest.mark.parametrize(
    ("y", "classes"),
    [
        (["b", "a", "b", "c"], ("a", "b", "c")),
        ([10, -2, 10, 0], ("-2", "0", "10")),
        ([1.0, 0.0, 1.0, 1.0], ("0", "1")),
        ([True, False, True, True], ("False", "True")),
        ([b"b", b"a", b"b", b"a"], ("a", "b")),
    ],
)
def test_labels_become_indices_of_sorted_names(y, classes):
    data = from_arrays("x", np.arange(4.0), np.array(y))
    assert data.classes == classes
    index = torch.cat([data.labels, data.held_out_labels]).tolist()
    order = [int(row[0]) for row in all_values(data)]
    plain = [v.decode() if isinstance(v, bytes) else v for v in y]
    assert [classes[k] for k in index] == [
        str(int(plain[i])) if isinstance(plain[i], float) else str(plain[i]) for i in order
    ]


def test_labels_that_do_not_fit():
    x = np.arange(4.0)
    with pytest.raises(UsageError, match=r"expected \(4,\)"):
        from_arrays("x", x, np.zeros(3))
    with pytest.raises(UsageError, match="whole numbers or text"):
        from_arrays("x", x, np.array([None, 1, 2, 3]))
    data = from_arrays("x", x, np.array([0.5, 1, 2, 3]))
    assert data.labels is None
    assert "left out" in data.notes[0]


def test_broken_array_files(tmp_path):
    for name in ("x.npy", "x.npz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nonsense")
        with pytest.raises(UsageError, match="cannot read"):
            load(str(tmp_path / name))
    np.savez_compressed(tmp_path / "z.npz", x=np.random.default_rng(0).integers(0, 9, (50, 50)))
    content = bytearray((tmp_path / "z.npz").read_bytes())
    content[200:400] = bytes(200)
    (tmp_path / "z.npz").write_bytes(content)
    with pytest.raises(UsageError, match="cannot read"):
        load(str(tmp_path / "z.npz"))
    np.savez(tmp_path / "o.npz", x=np.array([{}, {}], object))
    with pytest.raises(UsageError, match="numbers"):
        load(str(tmp_path / "o.npz"))


def test_image_size_for_arrays_and_for_vectors(tmp_path):
    data = from_arrays("x", np.zeros((4, 3, 20, 30), np.uint8), image_size=10)
    assert data.shape == (3, 10, 10)
    for spec in ("ring", saved(tmp_path, np.zeros((4, 2)))):
        with pytest.raises(UsageError, match="image_size is for images"):
            load(spec, image_size=10)


def test_resizing_arrays_agrees_with_pillow():
    rng = np.random.default_rng(3)
    x = np.kron(rng.integers(0, 256, (4, 6, 6), dtype=np.uint8), np.ones((5, 5), np.uint8))
    got = all_raw(from_arrays("x", x, image_size=12))[:, 0].astype(int)
    want = [np.asarray(Image.fromarray(image).resize((12, 12), Image.Resampling.BICUBIC)).astype(int) for image in x]
    for image in got:
        assert min(np.abs(image - other).max() for other in want) <= 1


def test_arrays_are_cropped_to_the_centre():
    x = np.zeros((4, 20, 60), np.uint8)
    x[:, :, 20:40] = 255
    for image in (x, x.transpose(0, 2, 1)):
        assert (all_raw(from_arrays("x", image, image_size=10)) == 255).all()


def test_read_only_arrays_are_copied_without_a_warning():
    x = np.zeros((4, 2), np.float32)
    x.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_arrays("x", x)


# --- tables -------------------------------------------------------------------------------------------------


def csv_file(tmp_path, text, encoding="utf-8"):
    (tmp_path / "t.csv").write_bytes(text.encode(encoding))
    return str(tmp_path / "t.csv")


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2.5\n3,-4e1\n5,6\n",
        "1,2.5\n3,-4e1\n5,6\n",
        "a;b\n1;2,5\n3;-40\n5;6\n",
        "1;2,5\r\n3;-40,0\r\n5;6\r\n",
        "1,0;2,5\n3,0;-40,0\n5,0;6,0\n",
        "a\tb\n1\t2.5\n3\t-40\n5\t6\n",
        '"a, first","b"\n"1", 2.5 \n3,-40\n\n5,6\n',
        "\ufeffa,b\n1,2.5\n3,-40\n5,6",
    ],
)
def test_csv_dialects(tmp_path, text):
    data = load(csv_file(tmp_path, text))
    assert sorted(all_values(data)) == [[1, 2.5], [3, -40], [5, 6]]
    assert data.notes == ()


def test_csv_of_one_column(tmp_path):
    assert sorted(all_values(load(csv_file(tmp_path, "value\n1\n2\n3\n")))) == [[1], [2], [3]]


def test_csv_text_columns_and_missing_cells_are_told(tmp_path):
    text = "name,a,empty,b\nx,1,,2\ny,NA,,3\nz,4,,5\nw,6,,\nv,7,,nan\nu,8,,9\n"
    data = load(csv_file(tmp_path, text))
    assert sorted(all_values(data)) == [[1, 2], [4, 5], [8, 9]]
    assert data.features == ("a", "b")
    said = " | ".join(summary(data).warnings)
    assert "name, empty" in said
    assert "3 of 6 rows" in said


def test_csv_row_numbers_without_a_name_are_left_out(tmp_path):
    data = load(csv_file(tmp_path, ",a\n0,5\n1,7\n2,6\n"))
    assert sorted(all_values(data)) == [[5], [6], [7]]
    assert "counts the rows" in data.notes[0]
    assert load(csv_file(tmp_path, ",a\n0,5\n9,7\n2,6\n")).features == ("", "a")


def test_csv_constant_columns_and_scales_are_told(tmp_path):
    rows = "\n".join(f"{i},{1000 * i},7,{i % 3}" for i in range(50))
    said = " | ".join(summary(load(csv_file(tmp_path, f"small,big,same,mod\n{rows}\n"))).warnings)
    assert "1 of 4 features are constant (same)" in said
    assert "mod (mean" in said
    assert "big (mean" in said
    assert "standardising" in said


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,b\nx,y\nz,w\n", "no column of numbers"),
        ("a,b\n", "no column of numbers"),
        ("", "empty"),
        ("a,b\n1,2\n3\n", "line 3 .* 1 cells"),
        ("a,b\n1,\n,2\n", "only 0 of 2 rows"),
        ("a,b\n1,2\n", "at least 2"),
        ("a,b\n1,2\n3,inf\n", "NaN or infinite.*'b'"),
        ('a,b\n1,2\n3,"4' + "\n5,6" * 40_000, "after line 2 .* quotation mark left open"),
    ],
)
def test_csv_that_is_refused(tmp_path, text, match):
    with pytest.raises(UsageError, match=match):
        load(csv_file(tmp_path, text))


def test_csv_in_another_encoding(tmp_path):
    with pytest.raises(UsageError, match="UTF-8"):
        load(csv_file(tmp_path, "größe,b\n1,2\n", encoding="utf-16"))


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, st.tuples(st.integers(2, 8), st.integers(1, 4)), elements=st.floats(-1e6, 1e6, width=32)))
def test_csv_round_trip(tmp_path_factory, x):
    file = io.StringIO()
    np.savetxt(file, x, delimiter=",", fmt="%.9g")
    (path := tmp_path_factory.mktemp("csv") / "t.csv").write_text(file.getvalue())
    assert sorted(all_values(load(str(path)))) == sorted(x.astype(np.float64).tolist())


# --- callables ----------------------------------------------------------------------------------------------

MODULE = """
import numpy as np
import torch
from helper_of_mydata import N

x = np.arange(2.0 * N).reshape(N, 2)
y = np.arange(N) % 2

def array(): return x
def tensor(): return torch.tensor(x, dtype=torch.bfloat16, requires_grad=True)
def pair(): return torch.from_numpy(x), y
def pairs_list(): return x, [str(v) for v in y]
def generator(): return (row for row in x)
def labelled(): return ((row, torch.tensor(k)) for row, k in zip(x, y))
def torch_dataset(): return Endless()
def loader(): return torch.utils.data.DataLoader(Endless(), batch_size=4)
def without_labels(): return torch.utils.data.TensorDataset(torch.as_tensor(x))
def own():
    from gankit.data import Dataset, Modes, Store
    return Dataset("own", Store(torch.zeros(5, 2)), Store(torch.ones(3, 2)), modes=Modes(torch.zeros(1, 2), 1.0, 3.0))
def pictures(): return [(np.full((6, 6, 3), k, np.uint8), "ab"[k % 2]) for k in range(N)]
def plain_pairs(): return [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]
class Endless(torch.utils.data.Dataset):
    def __len__(self): return N
    def __getitem__(self, i): return torch.tensor(x[i % N]), int(y[i % N])
    @staticmethod
    def make(): return x
def ragged(): return [[1.0], [2.0, 3.0]]
def nothing(): return None
def text(): return "abc"
def empty(): return iter(())
def broken(): return 1 / 0
def needs_argument(n): return n
number = 3
"""


@pytest.fixture
def mydata(tmp_path, monkeypatch):
    (tmp_path / "mydata.py").write_text(MODULE)
    (tmp_path / "helper_of_mydata.py").write_text("N = 10\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mydata", "helper_of_mydata", "_gankit_data_mydata"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("form", ["mydata:", "./mydata.py:", "{}/mydata.py:"])
def test_module_and_file(mydata, form):
    path = list(sys.path)
    data = load(form.format(mydata) + "array")
    assert sorted(all_values(data)) == np.arange(20.0).reshape(10, 2).tolist()
    assert sys.path == path


@pytest.mark.parametrize("name", ["tensor", "generator", "Endless.make", "plain_pairs", "without_labels"])
def test_callables_without_labels(mydata, name):
    data = load(f"mydata:{name}")
    assert data.labels is None
    values = sorted(all_values(data))
    assert values == ([[1, 2], [3, 4], [5, 6]] if name == "plain_pairs" else np.arange(20.0).reshape(10, 2).tolist())


@pytest.mark.parametrize("name", ["pair", "pairs_list", "labelled", "torch_dataset", "loader"])
def test_callables_with_labels(mydata, name):
    data = load(f"mydata:{name}")
    assert data.classes == ("0", "1")
    assert (len(data), len(data.test)) == (9, 1)
    assert data.labels.tolist() == [int(row[0] // 2) % 2 for row in data.batch(torch.arange(9)).tolist()]


def test_callable_of_pictures_and_of_a_data_set(mydata):
    calls = []
    data = load("mydata:pictures", image_size=2, progress=lambda *call: calls.append(call))
    assert (data.shape, data.classes) == ((3, 2, 2), ("a", "b"))
    assert calls[-1] == (10, 10)
    calls.clear()
    load("mydata:generator", progress=lambda *call: calls.append(call))
    assert calls == [*((i, 0) for i in range(1, 11)), (10, 10)]  # how many there are shows at their end
    own = load("mydata:own")
    assert (own.name, len(own), own.modes.radius) == ("own", 5, 3.0)
    with pytest.raises(UsageError, match="leave image_size out"):
        load("mydata:own", image_size=2)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mydata:ragged", "sample 1 .* shape"),
        ("mydata:nothing", "NoneType"),
        ("mydata:text", "returned str"),
        ("mydata:empty", "no sample"),
        ("mydata:broken", r"ZeroDivisionError.*line \d+ of .*mydata\.py"),
        ("mydata:needs_argument", "TypeError.*'n'$"),
        ("mydata:number", "not callable"),
        ("mydata:missing", "does not define missing"),
        ("nomodule_here:make", "needs the module 'nomodule_here'"),
        ("./nofile.py:make", r"no file \./nofile\.py"),
    ],
)
def test_callables_that_fail(mydata, name, match):
    with pytest.raises(UsageError, match=match):
        load(name)


# --- unknown names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("rnig", "did you mean 'ring'"),
        ("MNIST", "did you mean 'mnist'"),
        ("stacked_mnist", "did you mean 'stacked-mnist'"),
        ("qqq", "ring, grid, gaussians1200, heavy-mode, mnist, stacked-mnist"),
        ("", "no data set"),
        ("some/folder", "no file or folder some/folder"),
        ("photos.zip", "no file or folder"),
    ],
)
def test_unknown_specs(tmp_path, monkeypatch, spec, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=match):
        load(spec)


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"\.npy, \.npz or \.csv"):
        load(str(tmp_path / "x.parquet"))


# --- summary ------------------------------------------------------------------------------------------------


def test_summary_of_clean_data_has_facts_and_no_warning():
    found = summary(load("ring"))
    assert (found.name, found.count, found.held_out, found.shape) == ("ring", 100_000, 10_000, (2,))
    assert (found.channels, found.examined, found.warnings) == (None, 10_000, [])
    assert sum(found.class_histogram.values()) == 100_000
    low, high = found.value_range
    assert -1.06 < low < -1
    assert 1 < high < 1.06


def test_summary_counts_duplicates_exactly():
    x = np.arange(30.0)[:, None]
    said = summary(from_arrays("x", np.concatenate([x, x, x]))).warnings
    data = from_arrays("x", np.concatenate([x, x, x]))
    distinct = len({tuple(row) for row in data.batch(torch.arange(len(data))).tolist()})
    assert said == [f"{81 - distinct} of the 81 samples are exact copies of another one"]
    large = np.random.default_rng(0).normal(size=(60_000, 1)).astype(np.float32)
    large[30_000:] = large[0]
    (only,) = [line for line in summary(from_arrays("x", large)).warnings if "copies" in line]
    assert "of the 20,000 samples looked at of 54,000" in only
    assert abs(int(only.split()[0].replace(",", "")) - 10_000) < 500


def test_summary_of_classes():
    x = np.arange(3000.0)
    assert any("one class, '4'" in line for line in summary(from_arrays("x", x, np.full(3000, 4))).warnings)
    y = np.zeros(3000, int)
    y[:5] = 1
    assert any("very unequal" in line for line in summary(from_arrays("x", x, y)).warnings)
    y[:100] = 1
    found = summary(from_arrays("x", x, y))
    assert not any("unequal" in line for line in found.warnings)
    assert sum(found.class_histogram.values()) == found.count
    assert set(found.class_histogram) == {"0", "1"}


def test_summary_of_images_warns_of_dead_channels_not_of_dead_pixels():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (50, 3, 6, 6), dtype=np.uint8)
    x[:, :, 0] = 0  # a black border, as in MNIST
    found = summary(from_arrays("x", x))
    assert (found.channels, found.warnings) == (3, [])
    x[:, 1] = 9
    assert any("channel 1 of 3" in line for line in summary(from_arrays("x", x)).warnings)


def test_summary_warns_of_strange_values():
    rng = np.random.default_rng(0)
    dark = from_arrays("x", rng.integers(0, 2, (50, 6, 6), dtype=np.uint8))
    assert any("only span" in line for line in summary(dark).warnings)
    wild = Store(torch.from_numpy(rng.normal(0, 3, (50, 1, 6, 6)).astype(np.float32)))
    assert any("rescale" in line for line in summary(Dataset("x", wild, wild)).warnings)
    assert any("near 1" in line for line in summary(from_arrays("x", rng.normal(0, 1000, (50, 2)))).warnings)


def test_summary_of_the_smallest_data():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = summary(from_arrays("x", np.array([[1.0, 2.0], [3.0, 4.0]])))
    assert found.count == found.held_out == 1


def test_library_prints_nothing(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12.0).reshape(6, 2))
    code = f"from gankit.data import load, summary; summary(load({str(tmp_path / 'x.npy')!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# --- the real files -----------------------------------------------------------------------------------------

REAL = Path(os.environ.get("GANKIT_DATA", ""))


def real(*names):
    """Skip unless GANKIT_DATA names a folder that has these files."""
    if "GANKIT_DATA" not in os.environ:
        return pytest.mark.skip(reason="the variable GANKIT_DATA is not set")
    missing = [n for n in names if not ((REAL / n).is_file() or (REAL / f"{n}.gz").is_file())]
    return pytest.mark.skipif(bool(missing), reason=f"GANKIT_DATA has no {', '.join(missing)}")


needs_mnist = real(*(f"mnist/{name}" for name in digits_module.FILES))


@needs_mnist
def test_real_mnist_files_have_the_known_sums():
    for name, digest in digits_module.FILES.items():
        file = REAL / "mnist" / f"{name}.gz"
        if file.is_file():
            assert hashlib.sha256(file.read_bytes()).hexdigest() == digest


@needs_mnist
def test_real_mnist():
    data = load("mnist")
    found = summary(data)
    assert (found.count, found.held_out, found.shape, found.value_range) == (
        60_000,
        10_000,
        (1, 28, 28),
        (-1, 1),
    )
    assert list(found.class_histogram.values()) == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert found.warnings == []
    mean = (data.train.items.double().mean() / 255).item()
    assert mean == pytest.approx(0.1307, abs=5e-5)  # the figure everybody normalises with


@needs_mnist
def test_real_stacked_mnist():
    data = load("stacked-mnist")
    triples = data.digits @ torch.tensor([100, 10, 1])
    assert len(triples.unique()) == 1000
    q = np.bincount(triples.numpy(), minlength=1000) / len(triples)
    single = np.array([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]) / 60_000
    expected = 3 * (single * np.log(10 * single)).sum() + 999 / (2 * len(triples))
    assert stats.entropy(q, np.full(1000, 1e-3)) == pytest.approx(expected, rel=0.2)
    assert summary(data).warnings == []
    assert data.batch(torch.arange(64)).abs().max() == 1


@real("cifar10-test.zip")
def test_real_cifar10_test_images():
    data = load(str(REAL / "cifar10-test.zip"))
    found = summary(data)
    assert (found.count, found.held_out, found.shape) == (9000, 1000, (3, 32, 32))
    assert len(found.class_histogram) == 10
    assert min(found.class_histogram.values()) > 800
    assert found.warnings == []
