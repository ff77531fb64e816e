"""Image metrics against numpy, closed forms and torch-fidelity on picture files; provenance; and training undisturbed."""

from __future__ import annotations

import json
import math
import sys
import urllib.error
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gankit_inception
import numpy as np
import pytest
import scipy.linalg
import torch
from click.testing import CliRunner
from gankit_inception import METRICS, Inception, as_bytes, feature_metrics, load_extractor
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from gankit import GAN, UsageError
from gankit.cli import main
from gankit.data import Dataset, Store, load
from gankit.options import build
from gankit.provenance import metric_of
from gankit.testing import tiny_gan, write_digits
from gankit.training import measure

torch.set_num_threads(1)
torch_fidelity = gankit_inception.fidelity()

Array = NDArray[np.float64]
few = pytest.mark.filterwarnings("ignore:.*too few for FID")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the formulas ----------------------------------------------------------------------------------------------------


def numpy_fid(x: Array, y: Array) -> float:
    """||m1 - m2||^2 + tr(S1 + S2 - 2 R), R the root of S1^(1/2) S2 S1^(1/2), which has the trace of (S1 S2)^(1/2)."""
    s1, s2 = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(s1).real
    values = np.linalg.eigvalsh(root @ s2 @ root)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * np.sqrt(values.clip(0)).sum())


@few
@given(st.integers(20, 200), st.integers(20, 200), st.integers(2, 12), st.integers(0, 10**6), st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_fid_is_that_of_numpy_in_float64(n: int, m: int, d: int, seed: int, shift: float) -> None:
    x = randn(n, d, seed=seed) @ randn(d, d, seed=seed + 1)
    y = randn(m, d, seed=seed + 2) @ randn(d, d, seed=seed + 3) + shift
    found = feature_metrics(x, y, metrics=["fid"])["fid"]
    expected = numpy_fid(x.numpy(), y.numpy())
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert found == pytest.approx(feature_metrics(y, x, metrics=["fid"])["fid"], rel=1e-6, abs=1e-6)


@few
def test_fid_in_closed_form() -> None:
    """A shift by s costs |s|^2; scaling by c costs (c - 1)^2 tr S more; a rotation, for covariance 1, nothing."""
    x = randn(500, 6)
    s = randn(6, seed=1)
    assert feature_metrics(x + s, x, metrics=["fid"])["fid"] == pytest.approx(s.square().sum().item(), abs=1e-9)
    variance = np.trace(np.cov(x.numpy().T))
    centred = x - x.mean(dim=0)
    assert feature_metrics(3 * centred, centred, metrics=["fid"])["fid"] == pytest.approx(4 * variance, rel=1e-9)


@few
def test_fid_of_features_far_from_zero_keeps_its_digits() -> None:
    """In float32 the means alone are off by more than this."""
    x, y = randn(300, 4) + 1e4, randn(300, 4, seed=1) + 1e4
    expected = numpy_fid(x.numpy(), y.numpy())
    assert feature_metrics(x, y, metrics=["fid"])["fid"] == pytest.approx(expected, abs=1e-6)
    in_float32 = ((x.float().mean(0) - y.float().mean(0)) ** 2).sum() - ((x.mean(0) - y.mean(0)) ** 2).sum()
    assert abs(in_float32) > 1e-6


def numpy_kid(x: Array, y: Array) -> float:
    """The unbiased squared MMD, pair by pair."""

    def kernel(a: Array, b: Array) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


@few
@given(st.integers(5, 20), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_kid_of_all_samples_is_the_unbiased_mmd(n: int, d: int, seed: int) -> None:
    x, y = randn(n, d, seed=seed), randn(n, d, seed=seed + 1) + 0.5
    found = feature_metrics(x, y, metrics=["kid"], kid_subsets=2, kid_subset_size=10**6)["kid"]
    assert found == pytest.approx(numpy_kid(x.numpy(), y.numpy()), rel=1e-9, abs=1e-9)


@few
def test_kid_is_the_mean_over_random_subsets() -> None:
    x, y = randn(60, 3), randn(40, 3, seed=1)
    random = np.random.RandomState(7)  # the generator torch-fidelity names
    values = []
    for _ in range(5):
        first, second = random.choice(60, 10, replace=False), random.choice(40, 10, replace=False)
        values.append(numpy_kid(x.numpy()[first], y.numpy()[second]))
    found = feature_metrics(x, y, metrics=["kid"], kid_subsets=5, kid_subset_size=10, seed=7)["kid"]
    assert found == pytest.approx(np.mean(values), rel=1e-9)


def numpy_precision_recall(fake: Array, real: Array, k: int) -> tuple[float, float]:
    """Point by point, as in Kynkaanniemi et al. 2019, eq. 1 and 2."""

    def share_inside(points: Array, manifold: Array) -> float:
        radii = [np.sort([np.linalg.norm(a - b) for b in manifold])[k] for a in manifold]  # 0 is the point itself
        inside = [any(np.linalg.norm(p - a) <= r for a, r in zip(manifold, radii, strict=True)) for p in points]
        return float(np.mean(inside))

    return share_inside(fake, real), share_inside(real, fake)


@few
@given(st.integers(8, 40), st.integers(8, 40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_precision_and_recall_are_those_of_the_paper(n: int, m: int, d: int, k: int, seed: int) -> None:
    fake, real = 1.5 * randn(n, d, seed=seed), randn(m, d, seed=seed + 1) + 0.7
    found = feature_metrics(fake, real, metrics=["precision", "recall"], k=k)
    precision, recall = numpy_precision_recall(fake.numpy(), real.numpy(), k)
    assert found == {"precision": pytest.approx(precision, abs=1e-6), "recall": pytest.approx(recall, abs=1e-6)}


def clusters(*centres: float, n: int = 200, spread: float = 0.1, seed: int = 0) -> Tensor:
    return torch.cat([randn(n, 2, seed=seed + i) * spread + c for i, c in enumerate(centres)])


@few
def test_precise_but_narrow_and_broad_but_imprecise_are_told_apart() -> None:
    """The pair has been swapped in a well-known library; then each assertion here fails."""
    real = clusters(0, 10, 20, 30)
    narrow = clusters(0, n=800, seed=9)  # one of four kinds, perfectly
    broad = torch.cat([clusters(0, 10, 20, 30, seed=20), 100 + 50 * randn(2400, 2, seed=30)])  # all four, and much else
    one = feature_metrics(narrow, real, metrics=["precision", "recall"])
    assert one["precision"] > 0.95 and one["recall"] == pytest.approx(0.25, abs=0.02)
    other = feature_metrics(broad, real, metrics=["precision", "recall"])
    assert other["precision"] < 0.3 and other["recall"] > 0.95
    swapped = feature_metrics(real, narrow, metrics=["precision", "recall"])
    assert swapped["recall"] > 0.95 and swapped["precision"] < 0.3


@few
def test_inception_score_in_closed_form() -> None:
    """C sure and equally frequent classes score C; the same answer for all images scores 1."""
    features = randn(200, 2)
    sure = 200.0 * torch.eye(4).repeat(50, 1)
    score = feature_metrics(features, features, sure.repeat(10, 1), metrics=["inception_score"])["inception_score"]
    assert 3.95 < score <= 4  # the ten random parts are not quite equally mixed
    same = feature_metrics(features, features, sure[:1].repeat(200, 1), metrics=["inception_score"])
    assert same["inception_score"] == pytest.approx(1, abs=1e-9)
    assert feature_metrics(features, features, metrics=["inception_score", "fid"]).keys() == {"fid"}


def test_below_2048_samples_there_is_a_warning() -> None:
    features = randn(2048, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feature_metrics(features, features, metrics=["fid"])
    for fake, real in ((features[:2047], features), (features, features[:2047])):
        with pytest.warns(UserWarning, match="too few for FID"):
            feature_metrics(fake, real, metrics=["fid"])


@few
def test_what_is_not_finite_is_nan_and_what_does_not_fit_is_a_sentence() -> None:
    x = randn(10, 2)
    bad = x.clone()
    bad[0, 0] = math.inf
    found = feature_metrics(bad, x, x, metrics=["fid", "kid", "precision", "inception_score"])
    assert len(found) == 4 and all(math.isnan(value) for value in found.values())
    for arguments, message in [
        ((x, randn(10, 3)), "features"),
        ((x[:3], x), "at least 4"),
    ]:
        with pytest.raises(UsageError, match=message):
            feature_metrics(*arguments)
    with pytest.raises(UsageError, match="no metric 'FID'"):
        feature_metrics(x, x, metrics=["FID"])


# -- extractors ------------------------------------------------------------------------------------------------------

OWN = '''
import torch
from torch import nn

class Small(nn.Module):
    """Twelve features and four logits of 3 x 8 x 8 images; its weights come from the global generator."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.head = nn.Conv2d(3, 12, 3, stride=2), nn.Linear(12, 4)
        self.calls = 0

    def forward(self, x):
        assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1 and not self.training
        torch.rand(3)  # an extractor that uses the global generator
        self.calls += 1
        features = self.conv(x.expand(-1, 3, -1, -1)).square().mean(dim=(2, 3))
        return features, 20 * self.head(features)

def flat(x):
    return x.flatten(1)[:, :5]

def wrong(x):
    return x

number = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("extractors.py").write_text(OWN)
    yield "extractors"
    sys.modules.pop("extractors", None)


def test_an_extractor_of_ones_own(own: str) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    state = torch.get_rng_state()
    small = load_extractor(f"{own}:Small")
    assert torch.equal(torch.get_rng_state(), state)
    features, logits = small(images)
    assert features.shape == (4, 12) and features.dtype == torch.float64 and logits is not None
    assert len(small.weights) == 12 and small.weights == load_extractor(f"{own}:Small").weights
    flat = load_extractor(f"{own}:flat")
    expected = (images.double().flatten(1)[:, :5] / 127.5 - 1).float().double()
    torch.testing.assert_close(flat(images)[0], expected, rtol=0, atol=1e-6)
    assert flat(images)[1] is None
    assert flat.weights == "none" and flat.code == small.code
    Path("extractors.py").write_text(OWN + "\n# changed\n")
    assert load_extractor("./extractors.py:flat").code != flat.code
    for name, message in [(":wrong", "must give features"), (":number", "cannot be called"), (":none", "no 'none'")]:
        with pytest.raises(UsageError, match=message):
            load_extractor(own + name)(images)
    with pytest.raises(UsageError, match=r"no extractor 'inception'.*inception-v3-compat"):
        load_extractor("inception")


def test_batches_change_nothing(own: str) -> None:
    images = torch.randint(256, (150, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small, told = load_extractor(f"{own}:Small"), []
    whole = small(images, lambda *done: told.append(done))[0]
    assert told == [(64, 150), (128, 150), (150, 150)]
    torch.testing.assert_close(
        whole, torch.cat([small(images[i : i + 1])[0] for i in range(150)]), rtol=1e-5, atol=1e-6
    )


def test_bytes_are_those_of_a_picture_file() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(as_bytes(every / 127.5 - 1), every)
    assert as_bytes(torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("name", ["inception-v3-compat", "vgg16"])
def test_missing_weights_say_which_file_to_put_where(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(UsageError) as caught:
        load_extractor(name)
    message = str(caught.value)
    file = {"inception-v3-compat": "weights-inception-2015-12-05-6726825d.pth", "vgg16": "vgg16-397923af.pth"}[name]
    assert f"put {file} from https://" in message and f"/{file} into {tmp_path / 'torch/hub/checkpoints'}" in message
    assert "no network" in message and "-o inception.weights=FILE" in message and "\n" not in message
    with pytest.raises(UsageError, match=r"cannot be read from .*nothing\.pth"):
        load_extractor(name, weights=str(tmp_path / "nothing.pth"))


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of the Inception network's shape with random weights: everything but the true ones' numbers."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = str(tmp_path_factory.mktemp("weights") / "inception.pth")
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, path + ".empty")
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=path + ".empty")
    weights = nn.Module.state_dict(network)  # scaled so that random layers keep the size of what they are given
    torch.save({name: t * 6**0.5 if name.endswith("conv.weight") else t for name, t in weights.items()}, path)
    return path


@few
def test_the_inception_network_is_torch_fidelitys_own(random_inception: str, tmp_path: Path) -> None:
    """With random weights from a file: the same features give the same KID, precision and recall from picture files."""
    random = np.random.default_rng(0)
    fake, real = (random.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8) // c for n, c in ((10, 1), (5, 2)))
    extractor = load_extractor("inception-v3-compat", weights=random_inception)
    metrics = ("inception_score", "kid", "precision", "recall")  # FID of 2048 features would take seven seconds more
    (f, logits), (r, _) = extractor(torch.from_numpy(fake)), extractor(torch.from_numpy(real))
    assert f.shape == (10, 2048) and logits is not None and logits.shape == (10, 1008)
    found = feature_metrics(f, r, logits, metrics=metrics, kid_subsets=3)
    expected = torch_fidelity.calculate_metrics(
        input1=write_pictures(tmp_path / "fake", fake), input2=write_pictures(tmp_path / "real", real),
        isc=True, kid=True, prc=True, kid_subsets=3, kid_subset_size=5, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=random_inception, cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    names = ("inception_score_mean", "kernel_inception_distance_mean", "precision", "recall")
    assert list(found.values()) == pytest.approx([expected[name] for name in names], rel=1e-3, abs=1e-3)
    assert found["kid"] > 1e-2  # the two sets do differ
    grey = extractor(torch.from_numpy(fake[:1, :1]))[0]
    assert torch.equal(grey, extractor(torch.from_numpy(fake[:1, :1].repeat(3, axis=1)))[0])
    with pytest.raises(UsageError, match="not 2 channels"):
        extractor(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))


# -- the plugin ------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, images: NDArray[np.uint8]) -> str:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:05d}.png")
    return str(folder)


def pictures(n: int, held_out: int, seed: int = 0) -> Dataset:
    """RGB images, smooth noise of 8 x 8 pixels; the held-out ones are brighter."""
    stream = torch.Generator().manual_seed(seed)
    low = torch.rand(n + held_out, 3, 2, 2, generator=stream)
    items = (255 * nn.functional.interpolate(low, (8, 8), mode="bilinear")).to(torch.uint8)
    items[n:] = items[n:] // 2 + 100
    return Dataset("pictures", Store(items[:n]), Store(items[n:]))


def gan_of(plugin: Inception, data: Dataset | None, seed: int = 0, **settings: Any) -> GAN:
    """A GAN whose generator mixes random pictures of its own."""
    basis = 2 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) - 1

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, z: Tensor) -> Tensor:
            return (self.scale * torch.einsum("bk,kchw->bchw", z, basis)).tanh()

    gan = GAN(
        Generator(), nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), (3, 8, 8),
        **{"latent": tiny_gan().latent, "plugins": {"inception": plugin}, "seed": seed, **settings},
    )  # fmt: skip
    gan.data = data
    return gan.build()


def named(found: dict[str, float]) -> dict[str, float]:
    return {metric_of(name): value for name, value in found.items()}


def test_the_values_are_those_of_torch_fidelity_on_the_same_files(own: str, tmp_path: Path) -> None:
    """All five, to 1e-3, from 2,100 generated and 2,100 held-out pictures on disk."""
    plugin = Inception(extractor=f"{own}:Small", n=2100, kid_subsets=10, kid_subset_size=500)
    gan = gan_of(plugin, pictures(50, 2100))
    drawn: list[Tensor] = []
    found = named(measure(gan))
    gan.hook.evaluate(gan=gan, draw=lambda n: drawn.append(gan.draw(n, _evaluation(gan))) or drawn[0], step=0)
    small = load_extractor(f"{own}:Small").call

    class Same(torch_fidelity.FeatureExtractorBase):  # type: ignore[misc, name-defined]
        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            both = dict(zip(self.get_provided_features_list(), small(x), strict=True))
            return tuple(both[name] for name in self.features_list)

    torch_fidelity.register_feature_extractor("same", Same)
    data = gan.data
    assert data is not None
    expected = torch_fidelity.calculate_metrics(
        input1=write_pictures(tmp_path / "fake", as_bytes(drawn[0]).numpy()),
        input2=write_pictures(tmp_path / "real", as_bytes(data.held_out(2100)).numpy()),
        isc=True, fid=True, kid=True, prc=True, kid_subsets=10, kid_subset_size=500, feature_extractor="same",
        cuda=False, cache=False, verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    torch_fidelity.registry.FEATURE_EXTRACTORS_REGISTRY.pop("same")
    names = {
        "inception_score": "inception_score_mean",
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "precision": "precision",
        "recall": "recall",
    }
    assert found == {name: pytest.approx(expected[theirs], rel=1e-3, abs=1e-6) for name, theirs in names.items()}
    assert found["inception_score"] > 1.1 and found["fid"] > 1e-3 and 0 < found["precision"] + found["recall"] < 2


def _evaluation(gan: GAN) -> torch.Generator:
    from gankit.gan import derive_seed

    return torch.Generator().manual_seed(derive_seed(gan.seed, "evaluate"))


@few
def test_every_value_carries_its_provenance(own: str) -> None:
    gan = gan_of(Inception(extractor=f"{own}:Small", n=40, kid_subset_size=30), pictures(60, 50), seed=3)
    found = measure(gan)
    assert set(found) == set(gan.provenance)
    (fid,) = [name for name in found if metric_of(name) == "fid"]
    assert fid.startswith(f"fid@{own}:Small,n=40,test,")
    facts = gan.provenance[fid]
    small = load_extractor(f"{own}:Small")
    assert (facts["extractor"], facts["weights"], facts["code"]) == (f"{own}:Small", small.weights, small.code)
    assert (facts["n"], facts["real_n"], facts["split"], facts["seed"]) == (40, 40, "test", 3)
    assert facts["by"] == f"torch-fidelity {torch_fidelity.__version__}" and len(facts["reference"]) == 12
    assert gan.provenance[next(n for n in found if metric_of(n) == "kid")]["subset_size"] == 30
    json.dumps(gan.provenance)


@few
def test_values_of_different_provenance_never_share_a_column(own: str) -> None:
    data = pictures(60, 50)
    base = {"extractor": f"{own}:Small", "n": 40}

    def columns(plugin: Inception, data: Dataset = data, **settings: Any) -> set[str]:
        return set(measure(gan_of(plugin, data, **settings)))

    same = columns(Inception(**base))
    assert columns(Inception(**base), seed=1) == same
    assert columns(Inception(**base), data=data.to("cpu")) == same
    for other in (
        columns(Inception(**base | {"n": 41})),
        columns(Inception(**base | {"extractor": f"{own}:flat"})),
        columns(Inception(**base | {"extractor": "./extractors.py:Small"})),
    ):
        assert len(other) >= 4 and not other & same
    for other in (
        columns(Inception(**base, split="train")),
        columns(Inception(**base), data=pictures(60, 50, seed=1)),
        columns(Inception(**base), data=pictures(60, 39)),
    ):
        assert {metric_of(name) for name in other & same} == {"inception_score"}  # which is compared with nothing
    assert {metric_of(n) for n in same - columns(Inception(**base, k=4))} == {"precision", "recall"}
    assert {metric_of(n) for n in same - columns(Inception(**base, kid_subset_size=20))} == {"kid"}
    source = Path("extractors.py").read_text()
    Path("other.py").write_text(source.replace("manual_seed(5)", "manual_seed(6)"))
    weights = {load_extractor(f"./{file}.py:Small").weights for file in ("other", "extractors")}
    assert len(weights) == 2


@few
def test_true_images_score_better_than_noise_and_what_is_compared_with_what(own: str) -> None:
    data = pictures(400, 300)
    for split in ("test", "train"):
        plugin = Inception(extractor=f"{own}:flat", n=300, split=split, metrics=("fid",))
        gan = gan_of(plugin, data)
        truth, made = named(measure(gan, truth=data))["fid"], named(measure(gan))["fid"]
        assert (
            0.05 < truth < made
        )  # held-out pictures are brighter, and training ones are never compared with themselves
        assert set(measure(gan, truth=data)) == set(measure(gan))
        flat = load_extractor(f"{own}:flat")
        real = data.held_out(300) if split == "test" else data.batch(_first(400)[:300])
        fake = gan.draw(300, _evaluation(gan))
        expected = numpy_fid(flat(as_bytes(fake))[0].numpy(), flat(as_bytes(real))[0].numpy())
        assert made == pytest.approx(expected, rel=1e-6)


def _first(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


@few
def test_true_images_are_computed_once(own: str) -> None:
    plugin = Inception(extractor=f"{own}:Small", n=128, metrics=("fid",))
    gan = gan_of(plugin, pictures(60, 128))
    told: list[tuple[int, int, str]] = []
    gan.progress = lambda *done: told.append(done)
    first = measure(gan)
    assert told == [(64, 128, "true images"), (128, 128, "true images"),
                    (64, 128, "generated images"), (128, 128, "generated images")]  # fmt: skip
    told.clear()
    assert measure(gan) == first
    assert {what for _, _, what in told} == {"generated images"}
    gan.data = pictures(60, 128, seed=4)
    assert set(measure(gan)) != set(first)  # another data set, another reference


@few
@pytest.mark.parametrize("weights", ["a file.pth", None])
def test_the_file_of_the_weights_reaches_torch_fidelitys_loader(
    weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, str | None]] = []

    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float().flatten(1)[:, :5]

        def convert_features_tuple_to_dict(self, features: Tensor) -> dict[str, Tensor]:
            return {"2048": features, "logits_unbiased": features[:, :3]}

    def create(name: str, layers: list[str], *, feature_extractor_weights_path: str | None, **_: Any) -> Network:
        given.append((name, feature_extractor_weights_path))
        return Network()

    monkeypatch.setattr(gankit_inception.fidelity("utils"), "create_feature_extractor", create)
    gan = gan_of(Inception(weights=weights, n=20, metrics=("kid",)), pictures(60, 50))
    assert list(named(measure(gan))) == ["kid"]
    assert given == [("inception-v3-compat", weights)]


@few
def test_samples_that_are_not_finite_give_nan(own: str) -> None:
    gan = gan_of(Inception(extractor=f"{own}:Small", n=20), pictures(60, 50))
    with torch.no_grad():
        gan.generator.scale.fill_(math.nan)
    found = measure(gan)
    assert len(found) == 5 and all(math.isnan(value) for value in found.values())


def test_refusals(own: str) -> None:
    with pytest.raises(UsageError, match=r"images .*not samples of shape \(3,\)"):
        tiny_gan(plugins={"inception": Inception()})
    with pytest.raises(UsageError, match="no extractor 'inceptoin'"):
        tiny_gan("image", {"inception": Inception(extractor="inceptoin")})
    with pytest.raises(UsageError, match="set gan.data"):
        measure(tiny_gan("image", {"inception": Inception()}))
    with pytest.raises(UsageError, match="none applies to pictures"):
        measure(gan_of(Inception(metrics=("modes",)), pictures(60, 50)))
    for options, message in [
        ({"metrics": "fid,FID"}, "no metric 'FID'"),
        ({"n": 9}, "at least 10"),
        ({"n": 20, "k": 20}, "more than k"),
        ({"split": "validation"}, "test|train"),
        ({"metrics": ""}, "metrics names none: choose from inception_score"),
    ]:
        with pytest.raises(UsageError, match=message):
            build(Inception, options, "inception")
    with pytest.raises(ValueError, match="'test' or 'train', not 'validation'"):
        Inception(split="validation")  # type: ignore[arg-type]
    assert build(Inception, {"metrics": "fid, kid"}, "inception").metrics == ("fid", "kid")
    assert Inception().metrics == METRICS


def test_a_torchvision_that_does_not_fit_is_no_obstacle_and_others_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = gankit_inception.importlib.import_module, ["gankit_test_a", "gankit_test_b"]

    def failing(name: str) -> Any:
        if failures:
            raise RuntimeError(f"operator torchvision::{failures.pop(0)} does not exist")
        return real(name)

    monkeypatch.setattr(gankit_inception.importlib, "import_module", failing)
    assert gankit_inception.fidelity().__version__ == torch_fidelity.__version__
    assert hasattr(torch.ops.torchvision, "gankit_test_a") and hasattr(torch.ops.torchvision, "gankit_test_b")

    def broken(error: Exception) -> Callable[[str], Any]:
        def importing(name: str) -> Any:
            raise error

        return importing

    for error, message in [
        (ModuleNotFoundError("No module named 'torch_fidelity'"), 'pip install "torch-fidelity>=0.4.0"'),
        (RuntimeError("something else"), "may not fit torch: something else"),
    ]:
        monkeypatch.setattr(gankit_inception.importlib, "import_module", broken(error))
        with pytest.raises(UsageError, match=message):
            gankit_inception.fidelity()


# -- digits, stacked digits, and whole runs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Drawn digits in MNIST's files, and a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GANKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("GANKIT_DATA", raising=False)
        yield write_digits(tmp_path_factory.mktemp("data") / "mnist").parent


def digit_gan(plugin: Inception, data: Dataset, generator: Callable[[Tensor], Tensor] | None = None) -> GAN:
    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, z: Tensor) -> Tensor:
            made: Tensor = self.scale * generator(z) if generator else self.scale * z.new_zeros(len(z), *data.shape)
            return made

    channels, height, width = data.shape
    critic = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 1))
    gan = GAN(Generator(), critic, data.shape, tiny_gan().latent, plugins={"inception": plugin})
    gan.data = data
    return gan.build()


def test_stacked_digits_have_their_modes_and_reverse_kl(digits: Path) -> None:
    """True triples against their labels; a generator of 30 known triples against its own count."""
    data = load("stacked-mnist", data_root=str(digits))
    assert data.digits is not None
    rows = torch.arange(30)
    kinds = {tuple(row) for row in data.digits[rows].tolist()}

    def collapsed(z: Tensor) -> Tensor:
        return data.batch(rows.repeat(len(z) // 30 + 1)[: len(z)])

    gan = digit_gan(Inception(metrics=("modes",), mode_n=3000), data, collapsed)
    truth, columns = named(measure(gan, truth=data)), measure(gan)
    made = named(columns)
    shown = data.digits[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:3000]]
    q = np.unique(shown.numpy() @ [100, 10, 1], return_counts=True)[1] / 3000
    expected = {"modes": len(q), "reverse_kl": np.log(1000) + (q * np.log(q)).sum()}
    assert truth == {name: pytest.approx(value, rel=0.02) for name, value in expected.items()}
    assert len(kinds) - 2 <= made["modes"] <= len(kinds) + 2
    assert made["reverse_kl"] == pytest.approx(math.log(1000 / len(kinds)), abs=0.1)
    (column,) = [name for name in columns if metric_of(name) == "modes"]
    assert column.startswith("modes@digits,n=3000,")
    assert gan.provenance[column]["accuracy"] > 0.95 and gan.provenance[column]["weights"]


def test_samples_that_are_not_finite_are_no_modes(digits: Path) -> None:
    data = load("stacked-mnist", data_root=str(digits))
    gan = digit_gan(Inception(metrics=("modes",), mode_n=50), data, lambda z: z.new_full((len(z), 3, 28, 28), math.nan))
    assert named(measure(gan)) == {"modes": 0, "reverse_kl": math.log(1000)}


@few
def test_digits_as_an_extractor(digits: Path) -> None:
    data = load("mnist", data_root=str(digits))
    options: dict[str, Any] = {"extractor": "digits", "n": 300, "kid_subset_size": 100}
    gan = digit_gan(Inception(**options), data)
    truth, blank = named(measure(gan, truth=data)), named(measure(gan))
    assert truth["inception_score"] > 3 and blank["inception_score"] == pytest.approx(1)
    assert truth["fid"] < 0.1 * blank["fid"] and truth["kid"] < 0.1 * blank["kid"]
    assert truth["precision"] > 0.7 and truth["recall"] > 0.7 and blank["recall"] == 0
    stacked = load("stacked-mnist", data_root=str(digits))
    three = digit_gan(Inception(**options, metrics=("fid", "inception_score")), stacked)
    assert set(named(measure(three))) == {"fid"}  # three digits have no one class


FAST = [
    "--steps",
    "4",
    "--batch",
    "8",
    "--width",
    "4",
    "--eval-every",
    "2",
    "--eval-samples",
    "20",
    "--save-every",
    "0",
    "--no-report",
]

DROPOUT = '''
import torch
from torch import nn

def generator(shape, z_dim):
    """With dropout, whose random numbers are the global ones."""
    return nn.Sequential(nn.Linear(z_dim, 50), nn.Dropout(0.5), nn.Linear(50, 784), nn.Tanh(), nn.Unflatten(1, shape))
'''


def gankit(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(main, [*arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@few
def test_training_is_bit_for_bit_what_it_is_without(digits: Path, own: str) -> None:
    """An extractor that draws from the global generator, beside a generator network that does so, too."""
    Path("dropout.py").write_text(DROPOUT)
    common = ["run", "--data", "mnist", "--data-root", str(digits), "--generator", "dropout.py:generator", *FAST]
    metric = ["--plugin", "inception", "-o", "inception.n=30"]
    gankit(*common, "--name", "without")
    gankit(*common, *metric, "-o", f"inception.extractor={own}:Small", "--name", "own")
    gankit(*common, *metric, "-o", "inception.extractor=digits", "--name", "digits")
    weights = [Path(f"runs/{name}/checkpoints/step-000004/generator.safetensors").read_bytes()
               for name in ("without", "own", "digits")]  # fmt: skip
    assert weights[0] == weights[1] == weights[2]
    states = [torch.load(f"runs/{name}/checkpoints/step-000004/state.pt", weights_only=True)["global_rngs"]
              for name in ("without", "own", "digits")]  # fmt: skip
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][0], states[2][0])


@few
def test_a_run_records_values_truth_and_provenance_and_evaluate_repeats_them(digits: Path, own: str) -> None:
    gankit("run", "--data", "stacked-mnist", "--data-root", str(digits), "--plugin", "inception", "--name", "r",
           "-o", "inception.extractor=digits", "-o", "inception.n=30", "-o", "inception.mode-n=60", *FAST)  # fmt: skip
    truth, *rows = [json.loads(line) for line in Path("runs/r/metrics.jsonl").read_text().splitlines()]
    provenance = json.loads(Path("runs/r/provenance.json").read_text())
    columns = {name for name in rows[-1] if "@" in name}
    assert {metric_of(name) for name in columns} == {"modes", "reverse_kl", "fid", "kid", "precision", "recall"}
    assert columns == set(provenance) and columns <= set(truth) and len(rows) == 2
    assert not any(abs(truth[name]) == 0 for name in columns if metric_of(name) in ("modes", "fid"))
    result = gankit("evaluate", "r", "--checkpoint", "latest", "--json")
    found = json.loads(result.stdout)
    assert {name: found["metrics"][name] for name in columns} == pytest.approx(
        {n: rows[-1][n] for n in columns}, rel=1e-6
    )
    assert {name: found["truth"][name] for name in columns} == pytest.approx({n: truth[n] for n in columns}, rel=1e-6)
    assert found["provenance"] == provenance
    assert "FID (digits, n=30, test, " in result.stderr and "modes captured (digits, n=60, " in result.stderr


def test_a_run_whose_weights_are_missing_leaves_nothing_behind(
    digits: Path, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(Path.cwd() / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", lambda *_: (_ for _ in ()).throw(OSError("offline")))
    common = ["run", "--data", "mnist", "--data-root", str(digits), "--plugin", "inception", "--name", "r", *FAST]
    output = gankit(*common, code=2).output
    assert "put weights-inception-2015-12-05-6726825d.pth" in output and "offline" in output
    assert not Path("runs/r").exists()
