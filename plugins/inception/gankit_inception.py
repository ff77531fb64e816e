"""IS, FID, KID, precision and recall through torch-fidelity, and stacked MNIST's modes; each value with its provenance.

Inception score: Salimans et al. 2016, arXiv:1606.03498. FID: Heusel et al. 2017, arXiv:1706.08500. KID: Binkowski et al.
2018, arXiv:1801.01401. Precision and recall: Kynkaanniemi et al. 2019, arXiv:1904.06991. The formulas are torch-fidelity's;
here is what it takes to compare the numbers: features, and a name that two values share only if they may be compared.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gankit import UsageError, classifier, hookimpl
from gankit.data.dataset import scaled
from gankit.metrics import label_modes
from gankit.plugins import load_object
from gankit.provenance import column, hash_of

if TYPE_CHECKING:
    from gankit import GAN
    from gankit.data import Dataset

FEATURE_METRICS = ("inception_score", "fid", "kid", "precision", "recall")
METRICS = (*FEATURE_METRICS, "modes")
ENOUGH = 2048  # samples below which FID is mostly bias: Inception has as many features
IS_SPLITS = 10
BATCH = 64
# torch-fidelity's networks: the layer of the features, that of the logits
NETWORKS: dict[str, tuple[str, str | None]] = {
    "inception-v3-compat": ("2048", "logits_unbiased"),
    "vgg16": ("fc2_relu", None),
}

Progress = Callable[[int, int], None]
_declared: list[torch.library.Library] = []


def fidelity(module: str = "") -> Any:
    """The package torch_fidelity or one of its modules; UsageError where it is missing or cannot be imported.

    It imports torchvision, whose import stops where its compiled operators do not fit torch (a CPU torch beside a wheel
    that was built for CUDA). torch-fidelity uses none of them, so the names that are missed are declared; torchvision itself
    still tells whoever calls one.
    """
    name = f"torch_fidelity.{module}" if module else "torch_fidelity"
    for _ in range(10):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            way = 'pip install "torch-fidelity>=0.4.0"'
            raise UsageError(f"image metrics need torch-fidelity ({error}): {way}") from error
        except RuntimeError as error:
            missed = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missed is None:
                raise UsageError(
                    f"torch-fidelity cannot be imported, torchvision may not fit torch: {error}"
                ) from error
            _declared.append(torch.library.Library("torchvision", "FRAGMENT"))  # type: ignore[no-untyped-call]
            schema = f"{missed[1]}(Tensor boxes, Tensor scores, float threshold) -> Tensor"
            _declared[-1].define(schema)  # type: ignore[no-untyped-call]
    raise UsageError("torchvision does not fit torch: install the two together")


# -- features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extractor:
    """Features of images, and what tells this extractor from others.

    call: uint8 images (B, C, H, W) on ``device`` -> features (B, D), and logits (B, K) or None.
    weights: hash of its weights ("none" for a function). code: what defines the rest.
    """

    name: str
    call: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    weights: str
    code: str
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor | None]:
        """uint8 images (N, C, H, W) -> features (N, D) and logits (N, K) or None, float64 on the CPU."""
        features, logits = [], []
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH].to(self.device)
            found, scores = self.call(batch)
            if found.ndim != 2 or len(found) != len(batch):
                raise UsageError(
                    f"the extractor {self.name} must give features (B, D), one row for each image; "
                    f"for {len(batch)} images it gives {tuple(found.shape)}"
                )
            features.append(found.double().cpu())
            if scores is not None:
                logits.append(scores.double().cpu())
            if progress is not None:
                progress(min(start + BATCH, len(images)), len(images))
        return torch.cat(features), torch.cat(logits) if logits else None


def load_extractor(
    name: str,
    *,
    device: torch.device | str = "cpu",
    weights: str | None = None,
    data_root: str | None = None,
    progress: Progress | None = None,
) -> Extractor:
    """The extractor called ``name``; nobody's random numbers are touched.

    name: "inception-v3-compat" (the network of FID) or "vgg16" (that of precision and recall in their paper), both from
        torch-fidelity; "digits", gankit's own classifier of MNIST, channel by channel; or ``module:callable``, which is
        called with images (B, C, H, W) in [-1, 1] and returns features (B, D), or features and logits; a class is
        instantiated without arguments first, a torch Module moved to the device and put in evaluation mode.
    weights: file of a torch-fidelity network's weights, where it shall not be downloaded. data_root, progress: for
        "digits", see ``gankit.classifier.digits``.

    UsageError, with what to do, if it cannot be had.
    """
    device = torch.device(device)
    cuda = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=cuda):  # modules draw their first weights from the global generator
        if name == "digits":
            return _digits(classifier.digits(data_root, progress).to(device), device)
        return _own(name, device) if ":" in name else _network(name, device, weights)


def _digits(digits: classifier.Classifier, device: torch.device) -> Extractor:
    def call(images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = digits(scaled(images))
        return features.flatten(1), logits.squeeze(1) if images.shape[1] == 1 else None

    return Extractor("digits", call, digits.hash, f"gankit.classifier {classifier.RECIPE}", device)


def _own(spec: str, device: torch.device) -> Extractor:
    own, path = load_object(spec)
    if inspect.isclass(own):
        own = own()
    if not callable(own):
        raise UsageError(f"the extractor {spec} is a {type(own).__name__}, which cannot be called with images")
    if isinstance(own, nn.Module):
        own = own.to(device).eval()

    def call(images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = own(scaled(images))
        return (found, None) if isinstance(found, Tensor) else tuple(found)

    weights = hash_of(own.state_dict()) if isinstance(own, nn.Module) else "none"
    code = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path else "unknown"
    return Extractor(spec, call, weights, code, device)


def _network(name: str, device: torch.device, weights: str | None) -> Extractor:
    if name not in NETWORKS:
        raise UsageError(f"there is no extractor {name!r}: take {', '.join(NETWORKS)}, digits or module:callable")
    layer, logits_layer = NETWORKS[name]
    layers = [layer, logits_layer] if logits_layer else [layer]
    version = fidelity().__version__
    try:
        network = fidelity("utils").create_feature_extractor(
            name, layers, cuda=False, verbose=False, feature_extractor_weights_path=weights
        )
    except Exception as error:  # whatever the network, the disk or the file does
        raise UsageError(_no_weights(name, weights, error)) from error
    network.to(device)

    def call(images: Tensor) -> tuple[Tensor, Tensor | None]:
        if images.shape[1] not in (1, 3):
            raise UsageError(f"{name} sees grey and RGB images, not {images.shape[1]} channels: name another extractor")
        found = network.convert_features_tuple_to_dict(network(images.expand(-1, 3, -1, -1)))
        return found[layer], found[logits_layer] if logits_layer else None

    return Extractor(name, call, hash_of(network.state_dict()), f"torch-fidelity {version}", device)


def _no_weights(name: str, weights: str | None, error: Exception) -> str:
    """The sentence that says which file to put where."""
    if weights is not None:
        return f"the weights of {name} cannot be read from {weights}: {error}"
    if name == "vgg16":
        url = importlib.import_module("torchvision").models.VGG16_Weights.IMAGENET1K_V1.url
    else:
        url = fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return (
        f"the weights of {name} could not be loaded ({error}): put {url.rpartition('/')[2]} from {url} into {folder}, "
        "or name the file with -o inception.weights=FILE; for images of digits, -o inception.extractor=digits needs none"
    )


def as_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, as a picture file holds them: round(127.5 (x + 1)), clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# -- metrics ---------------------------------------------------------------------------------------------------------


def feature_metrics(
    fake: Tensor,
    real: Tensor,
    logits: Tensor | None = None,
    *,
    metrics: Iterable[str] = FEATURE_METRICS,
    k: int = 3,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    seed: int = 2020,
) -> dict[str, float]:
    """Metrics by name of generated features ``fake`` (N, D) against ``real`` (M, D): torch-fidelity's formulas in float64.

    inception_score: exp mean KL(p(y | x) || p(y)) of the classes that ``logits`` (N, K) of generated images predict, mean
        of 10 random parts; left out without logits. Larger is better.
    fid: ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the means and covariances. Biased upwards as N falls.
    kid: the unbiased squared MMD with kernel (x . y / D + 1)^3, the mean over ``kid_subsets`` random subsets of
        ``kid_subset_size`` (or of all there are, if fewer). Unbiased, so it may be slightly negative.
    precision: the share of *generated* samples that lie no farther from some *real* sample than its k-th nearest real one:
        are they realistic? recall: the share of *real* samples that lie so near a *generated* one: are all kinds made?

    seed: of the random parts and subsets. Where features or logits are not finite, every number is nan. Warns below 2,048
    samples. UsageError for other shapes or names, or k samples or fewer.
    """
    metrics = tuple(metrics)
    if unknown := [name for name in metrics if name not in FEATURE_METRICS]:
        raise UsageError(f"there is no metric {unknown[0]!r} of features; there are {', '.join(FEATURE_METRICS)}")
    if fake.ndim != 2 or real.ndim != 2 or fake.shape[1:] != real.shape[1:]:
        raise UsageError(f"give features (N, D) and (M, D), not {tuple(fake.shape)} and {tuple(real.shape)}")
    fewest = min(len(fake), len(real))
    if fewest <= k:
        raise UsageError(f"with k = {k}, at least {k + 1} generated and true samples are needed, not {fewest}")
    if fewest < ENOUGH:
        warnings.warn(
            f"{len(fake):,} generated and {len(real):,} true samples are too few for FID and its kin: "
            f"below {ENOUGH:,} they measure the number of samples more than their quality",
            stacklevel=2,
        )
    fake, real = fake.detach().double().cpu(), real.detach().double().cpu()
    if logits is None:
        metrics = tuple(name for name in metrics if name != "inception_score")
    if not all(t.isfinite().all() for t in (fake, real, logits) if t is not None):
        return dict.fromkeys(metrics, math.nan)
    found: dict[str, float] = {}
    if logits is not None and "inception_score" in metrics:
        score = fidelity("metric_isc").isc_features_to_metric(logits.detach().cpu(), IS_SPLITS, True, seed)
        found["inception_score"] = score["inception_score_mean"]
    if "fid" in metrics:
        fid = fidelity("metric_fid")
        statistics = [fid.fid_features_to_statistics(features) for features in (fake, real)]
        found["fid"] = fid.fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    if "kid" in metrics:
        size = min(kid_subset_size, fewest)
        found["kid"] = fidelity("metric_kid").kid_features_to_metric(
            fake, real, kid_subsets=kid_subsets, kid_subset_size=size, rng_seed=seed, verbose=False
        )["kernel_inception_distance_mean"]
    if {"precision", "recall"} & {*metrics}:
        both = fidelity("metric_prc").prc_features_to_metric(
            fake, real, prc_neighborhood=k, prc_batch_size=1024, save_cpu_ram=True, verbose=False
        )
        found |= {name: both[name] for name in ("precision", "recall") if name in metrics}
    return {name: found[name] for name in metrics}


@dataclass(eq=False)
class Inception:
    """Measure IS, FID, KID, precision, recall, and on stacked MNIST modes and reverse KL, each with its provenance."""

    formula: ClassVar[str] = (
        "FID = ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features of generated and true images"
    )
    paper: ClassVar[str] = (
        "IS arXiv:1606.03498, FID arXiv:1706.08500, KID arXiv:1801.01401, precision and recall arXiv:1904.06991, "
        "modes of stacked MNIST arXiv:1712.04086"
    )

    extractor: Annotated[str, "inception-v3-compat, vgg16, digits, or your own, module:callable"] = (
        "inception-v3-compat"
    )
    n: Annotated[int, "generated samples, and true ones as far as there are as many"] = 10_000
    split: Annotated[Literal["test", "train"], "true samples to compare with: held out, or trained on"] = "test"
    metrics: Annotated[tuple[str, ...], "which of these; those that do not apply are left out"] = METRICS
    k: Annotated[int, "neighbour that sets the radius of precision and recall"] = 3
    kid_subsets: Annotated[int, "random subsets KID is averaged over"] = 100
    kid_subset_size: Annotated[int, "samples in each of them"] = 1000
    mode_n: Annotated[int, "generated samples for modes and reverse KL of stacked MNIST"] = 26_000
    weights: Annotated[str | None, "file of inception-v3-compat's or vgg16's weights, if not to be downloaded"] = None

    def __post_init__(self) -> None:
        if not self.metrics:
            raise ValueError(f"metrics names none: choose from {', '.join(METRICS)}, or leave inception out")
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
        if min(self.k, self.kid_subsets, self.mode_n) < 1 or self.kid_subset_size < 2:
            raise ValueError("k, kid_subsets and mode_n must be at least 1, and kid_subset_size 2")
        if self.n < max(IS_SPLITS, self.k + 1):
            raise ValueError(f"n must be at least {IS_SPLITS}, and more than k")
        if self.split not in ("test", "train"):
            raise ValueError(f"split is 'test' or 'train', not {self.split!r}")
        self._extractor: Extractor | None = None
        self._digits: classifier.Classifier | None = None
        self._real: tuple[Dataset, Tensor, str] | None = None

    @hookimpl
    def setup(self, gan: GAN) -> None:
        """Refuse data that are no images, and an extractor that there is not."""
        if len(gan.shape) != 3:
            raise UsageError(
                f"inception measures images (channels, height, width), not samples of shape {gan.shape}: leave it out"
            )
        if ":" not in self.extractor and self.extractor not in ("digits", *NETWORKS):
            load_extractor(self.extractor)

    @hookimpl
    def evaluate(self, gan: GAN, draw: Callable[[int], Tensor], step: int | None) -> dict[str, float] | None:
        """The metrics that apply, under names that carry their provenance."""
        if gan.data is None:
            raise UsageError("inception compares with true images: set gan.data to a gankit.data.Dataset")
        if step is None and self.split == "train":  # training samples would be compared with themselves
            draw = gan.data.held_out
        found: dict[str, float] = {}
        with gan.initialising(self):  # an extractor's own random numbers are always the same, and nobody else's
            if gan.data.digits is not None and "modes" in self.metrics:
                found |= self._modes(gan, draw)
            if {*self.metrics} & {*FEATURE_METRICS}:
                found |= self._features(gan, gan.data, draw)
        if not found:
            raise UsageError(f"of the metrics {', '.join(self.metrics)} none applies to {gan.data.name}")
        return found

    def _modes(self, gan: GAN, draw: Callable[[int], Tensor]) -> dict[str, float]:
        """Modes and reverse KL of the digits in the channels; samples that are not finite count for none."""
        if self._digits is None:
            self._digits = classifier.digits(_root(gan), _telling(gan, "training a classifier of digits")).to(
                gan.device
            )
        samples = draw(self.mode_n)
        finite = samples[samples.flatten(1).isfinite().all(dim=1)]
        labels = (
            self._digits.labels(scaled(as_bytes(finite))) if len(finite) else torch.empty(0, samples.shape[1]).long()
        )
        facts = {
            "extractor": "digits",
            "weights": self._digits.hash,
            "code": classifier.RECIPE,
            "accuracy": self._digits.accuracy,
            "n": len(samples),
            "seed": gan.seed,
        }
        return _named(gan, label_modes(labels), facts)

    def _features(self, gan: GAN, data: Dataset, draw: Callable[[int], Tensor]) -> dict[str, float]:
        """The metrics of features."""
        if self._extractor is None:
            self._extractor = load_extractor(
                self.extractor,
                device=gan.device,
                weights=self.weights,
                data_root=_root(gan),
                progress=_telling(gan, "training a classifier of digits"),
            )
        if self._real is None or self._real[0] is not data:
            images = as_bytes(self._true(data)).cpu()
            self._real = data, self._extractor(images, _telling(gan, "true images"))[0], hash_of({"images": images})
        extractor, (_, real, reference) = self._extractor, self._real
        samples = draw(self.n)
        fake, logits = extractor(as_bytes(samples.nan_to_num()), _telling(gan, "generated images"))
        wanted = [name for name in self.metrics if name in FEATURE_METRICS]
        found = feature_metrics(
            fake if samples.isfinite().all() else fake * math.nan,
            real,
            logits,
            metrics=wanted,
            k=self.k,
            kid_subsets=self.kid_subsets,
            kid_subset_size=self.kid_subset_size,
        )
        common = {
            "extractor": extractor.name,
            "weights": extractor.weights,
            "code": extractor.code,
            "n": len(fake),
            "seed": gan.seed,
            "by": f"torch-fidelity {fidelity().__version__}",
        }
        against = {"split": self.split, "real_n": len(real), "reference": reference}
        size = min(self.kid_subset_size, len(fake), len(real))
        facts: dict[str, dict[str, Any]] = {
            "inception_score": {"splits": IS_SPLITS},
            "fid": against,
            "kid": {**against, "subsets": self.kid_subsets, "subset_size": size},
            "precision": {**against, "k": self.k},
            "recall": {**against, "k": self.k},
        }
        return {
            key: number
            for name, value in found.items()
            for key, number in _named(gan, {name: value}, {**common, **facts[name]}).items()
        }

    def _true(self, data: Dataset) -> Tensor:
        """Up to n true images: held out, or drawn from the training set once and for all."""
        if self.split == "test":
            return data.held_out(self.n)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        return data.batch(order[: self.n].to(data.device))


def _named(gan: GAN, found: Mapping[str, float], facts: Mapping[str, Any]) -> dict[str, float]:
    """The values under their columns' names, whose provenance the GAN then knows."""
    columns = {name: column(name, facts) for name in found}
    gan.provenance |= {key: dict(facts) for key in columns.values()}
    return {columns[name]: value for name, value in found.items()}


def _telling(gan: GAN, what: str) -> Progress:
    return lambda done, total: gan.progress(done, total, what)


def _root(gan: GAN) -> str | None:
    return gan.data.root if gan.data else None
