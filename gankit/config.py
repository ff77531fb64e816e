"""What a run is asked to do: one dataclass behind the flags, the TOML file and the record of a run. Free of torch."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from gankit.errors import UsageError
from gankit.options import build, closest, convert, options_of

LossName = Literal[
    "non_saturating",
    "saturating",
    "least_squares",
    "wasserstein",
    "hinge",
    "relativistic",
    "relativistic_average",
]
LOSSES: tuple[str, ...] = get_args(LossName)
Device = Literal["auto", "cpu", "cuda"]
Options = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Config:
    """Every setting of a run. ``None`` means: by the recipe for this kind of data (see :data:`RECIPES`)."""

    data: Annotated[
        str,
        "ring, grid, gaussians1200, heavy-mode, mnist, stacked-mnist, or your own: a folder or zip of images, a"
        " .npy/.npz/.csv file, module:callable",
    ] = "ring"
    data_root: Annotated[str | None, "folder of the MNIST files (else GANKIT_DATA, else a download)"] = None
    image_size: Annotated[
        int | None,
        "side in pixels to which images are resized (their centre square); else a folder's equal squares up to 64 px keep"
        " theirs, and others get 32",
    ] = None

    plugin: Annotated[
        tuple[str, ...],
        "switch a plugin on: a name from `gankit plugins`, file.py:Class or module:Class; repeatable",
    ] = ()
    allow: Annotated[tuple[str, ...], "turn an error that ends in --allow NAME into a warning; repeatable"] = ()
    loss: Annotated[
        LossName,
        "non-saturating, saturating, least-squares (-o loss.a=0 -o loss.b=1 -o loss.c=1), wasserstein, hinge, relativistic"
        " or relativistic-average",
    ] = "non_saturating"

    network: Annotated[
        Literal["auto", "mlp", "dcgan", "resnet"],
        "family of networks; auto: mlp (of one latent with Fourier features of it) or dcgan",
    ] = "auto"
    generator: Annotated[
        str | None,
        "your own: module:factory or file.py:factory, called with those of shape, z_dim, latent, width, depth that it has"
        " as arguments",
    ] = None
    discriminator: Annotated[
        str | None,
        "your own: module:factory or file.py:factory, called with those of shapes, shape, z_dim, width, depth that it has"
        " as arguments",
    ] = None
    width: Annotated[
        int | None, "hidden units of G (mlp; D has twice as many), or channels next to the image (dcgan, resnet)"
    ] = None
    depth: Annotated[int | None, "hidden layers of an mlp"] = None
    z_dim: Annotated[int | None, "dimensions of the latent"] = None
    z: Annotated[Literal["normal", "uniform"] | None, "prior of the latent; uniform is on (-1, 1)"] = None
    ema: Annotated[float | None, "decay per step of the averaged generator used for samples and metrics; 0: off"] = None

    steps: Annotated[int | None, "generator updates in all"] = None
    batch: Annotated[int | None, "samples per update"] = None
    lr_g: Annotated[float | None, "Adam's learning rate for the generator (and what trains with it)"] = None
    lr_d: Annotated[float | None, "Adam's learning rate for the discriminator; unequal ones are TTUR"] = None
    beta1: Annotated[float | None, "Adam's beta1, the decay of the first moment (momentum)"] = None
    beta2: Annotated[float | None, "Adam's beta2, the decay of the second moment"] = None
    d_steps: Annotated[int, "discriminator updates per step (n_critic, n_dis)"] = 1
    simultaneous: Annotated[
        bool, "update D and G at the same time, each against the other as it was; default: D first, then G"
    ] = False
    decay_from: Annotated[
        float | None, "share of the steps after which both learning rates fall linearly; 1: never"
    ] = None
    decay_to: Annotated[float | None, "share of the learning rates that is left at the end"] = None

    seed: Annotated[int, "same seed, same machine, same bits (on a CPU)"] = 0
    device: Annotated[Device, "auto: cuda if there is one"] = "auto"
    threads: Annotated[int | Literal["auto"], "CPU threads; auto: by the work in one update"] = "auto"

    out: Annotated[str, "folder that collects runs"] = "runs"
    name: Annotated[str | None, "name of the run's folder; default: number, data, plugins"] = None
    log_every: Annotated[int, "steps between lines of stats.jsonl"] = 50
    eval_every: Annotated[
        int | None, "steps between evaluations and sample pictures; 0: at the end only  [a tenth of the steps]"
    ] = None
    save_every: Annotated[
        int | None, "steps between checkpoints, beside the best evaluation's and the last  [a tenth of the steps]"
    ] = None
    eval_samples: Annotated[int | None, "generated samples per evaluation"] = None
    keep: Annotated[int, "latest checkpoints to keep, besides the best"] = 2

    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "width",
            "depth",
            "z_dim",
            "d_steps",
            "log_every",
            "keep",
            "image_size",
        ):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "save_every", "lr_g", "lr_d"):
            _at_least(name, getattr(self, name), 0)
        _at_least("eval_samples", self.eval_samples, 2)
        for name in ("ema", "beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
        for name in ("decay_from", "decay_to"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} is a share, 0 to 1, not {value}")
        if self.threads != "auto":
            _at_least("threads", self.threads, 1)


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


# What None stands for, by kind of data. "plane" is 2-D data with the pair-wise paper's one-dimensional latent.
RECIPES: dict[str, dict[str, Any]] = {
    "plane": {
        "z_dim": 1, "z": "uniform", "ema": 0.998, "steps": 5000, "batch": 128, "lr_g": 2e-3, "lr_d": 3e-3,
        "beta1": 0.0, "beta2": 0.99, "decay_from": 0.5, "decay_to": 0.2, "width": 96, "depth": 3, "eval_samples": 10_000,
    },
    "vector": {
        "z_dim": 64, "z": "normal", "ema": 0.998, "steps": 5000, "batch": 256, "lr_g": 5e-4, "lr_d": 5e-4,
        "beta1": 0.5, "beta2": 0.999, "decay_from": 0.5, "decay_to": 0.0, "width": 256, "depth": 3,
        "eval_samples": 10_000,
    },
    "image": {
        "z_dim": 64, "z": "normal", "ema": 0.995, "steps": 2000, "batch": 64, "lr_g": 5e-4, "lr_d": 5e-4,
        "beta1": 0.5, "beta2": 0.999, "decay_from": 0.5, "decay_to": 0.1, "eval_samples": 2048,
    },
}  # fmt: skip


def kind_of(shape: tuple[int, ...]) -> str:
    """Whose recipe samples of this shape get: "plane", "vector" or "image"."""
    return "image" if len(shape) == 3 else "plane" if shape == (2,) else "vector"


def resolve(config: Config, shape: tuple[int, ...]) -> Config:
    """The configuration with every ``None`` of the recipe filled in for samples of this shape."""
    filled = {k: v for k, v in RECIPES[kind_of(shape)].items() if getattr(config, k) is None}
    config = replace(config, **filled)
    assert config.steps is not None
    every = max(1, config.steps // 10)
    return replace(
        config,
        eval_every=every if config.eval_every is None else config.eval_every,
        save_every=every if config.save_every is None else config.save_every,
    )


def make(values: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]) -> Config:
    """A checked configuration from values by field name (text or TOML values) and options by plugin."""
    known = options_of(Config)
    for key in values:
        if key not in known or key == "options":
            names = [name for name in known if name != "options"]
            raise UsageError(f"there is no setting {key!r}{closest(key, names)}; see gankit run --help")
    config: Config = build(Config, dict(values), "setting")
    found = {name: dict(chosen) for name, chosen in options.items()}
    if "loss" in found:  # its options are numbers, whatever the loss
        found["loss"] = {name: convert(value, float, f"loss.{name}") for name, value in found["loss"].items()}
    return replace(config, options=found)


def parse_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file; UsageError, which calls it ``what``, if it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read the {what} {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def read_toml(path: Path) -> tuple[dict[str, Any], Options]:
    """Settings and plugin options of a TOML file: flags by name at the top, ``[options.<plugin>]`` tables below."""
    content = parse_toml(path, "configuration")
    options = content.pop("options", {})
    if not isinstance(options, dict) or not all(isinstance(table, dict) for table in options.values()):
        raise UsageError(f"{path}: plugin options go into tables, [options.<plugin>]")
    return {key.replace("-", "_"): value for key, value in content.items()}, options


def to_toml(config: Config) -> str:
    """The configuration as TOML that ``--config`` reads back to an equal one; unset values are left out."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "options"}
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    for name, chosen in config.options.items():
        lines += [
            "",
            f"[options.{_key(name)}]",
            *(f"{_key(k)} = {_toml(v)}" for k, v in chosen.items() if v is not None),
        ]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    """A key as TOML has it: bare if it may be."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def to_flags(config: Config) -> list[str]:
    """The words after ``gankit run`` that ask for this configuration; what is the default is left out, but for the data."""
    words: list[str] = []
    for f in fields(config):
        value, flag = getattr(config, f.name), f"--{f.name.replace('_', '-')}"
        if f.name == "options" or (value == f.default and f.name != "data"):
            continue
        if value is True:
            words.append(flag)
        else:
            words += [word for one in (value if isinstance(value, tuple) else [value]) for word in (flag, _typed(one))]
    chosen = [(owner, name, value) for owner, table in config.options.items() for name, value in table.items()]
    return [*words, *(w for owner, name, value in chosen for w in ("-o", f"{owner}.{name}={_typed(value)}"))]


def _typed(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_typed, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def plain(config: Config) -> dict[str, Any]:
    """The configuration in plain containers, for JSON and for checkpoints."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return content


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``name: old -> new`` for every value that differs between two plain dictionaries."""
    found = []
    for key in sorted({*recorded, *now}):
        old, new = recorded.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return found
