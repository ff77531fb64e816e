"""Options and configuration: types, closest matches, TOML round trips."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gankit import UsageError, losses
from gankit import data as datasets
from gankit.config import (
    LOSSES,
    RECIPES,
    Config,
    LossName,
    differences,
    make,
    plain,
    read_toml,
    resolve,
    to_toml,
)
from gankit.options import build, convert, options_of, type_name


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("3", int, 3), ("1e3", int, 1000), (2.0, int, 2), ("0.5", float, 0.5), (1, float, 1.0), ("yes", bool, True),
        ("off", bool, False), (True, bool, True), ("none", int | None, None), ("4", int | None, 4),
        ("a-b", Literal["a_b", "c"], "a_b"), ("1,2", tuple[float, ...], (1.0, 2.0)), ([1, 2], tuple[int, ...], (1, 2)),
        ("auto", int | Literal["auto"], "auto"), ("2", int | Literal["auto"], 2), ("x", str, "x"),
        ("123456789012345678901", int, 123456789012345678901),
    ],
)  # fmt: skip
def test_convert(value: object, annotation: object, expected: object) -> None:
    found = convert(value, annotation, "x")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        ("1.5", int),
        ("x", float),
        ("nan", float),
        ("inf", int),
        ("-1e999", int),
        ("1e400", int | None),
        (math.inf, int | Literal["auto"]),
        (True, int),
        ("maybe", bool),
        ("d", Literal["a"]),
        (3, str),
        ([1], int),
    ],
)
def test_what_does_not_fit_is_one_sentence(value: object, annotation: object) -> None:
    with pytest.raises(UsageError, match="plugin.weight must be"):
        convert(value, annotation, "plugin.weight")


@dataclass
class Schema:
    weight: Annotated[float, "lambda"] = 10.0
    needed: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError("weight must not be negative")


def test_build_names_the_option_and_the_closest_match() -> None:
    assert build(Schema, {"needed": "2", "weight": "3"}, "p") == Schema(3.0, needed=2)
    assert options_of(Schema)["weight"].help == "lambda"
    for values, message in [
        ({"wieght": 1, "needed": 1}, "no option 'wieght' .did you mean 'weight'.*it has weight, needed"),
        ({}, "needs a value for 'needed'"),
        ({"needed": 1, "weight": -1}, "p: weight must not be negative"),
    ]:
        with pytest.raises(UsageError, match=message):
            build(Schema, values, "p")


def test_type_names_are_for_people() -> None:
    assert type_name(float | None) == "number or none"
    assert type_name(tuple[int, ...]) == "list of whole number"
    assert type_name(Literal["a", "b"]) == "a|b"


def test_names_kept_free_of_torch_agree_with_the_modules_that_need_it() -> None:
    assert set(LOSSES) == set(losses.LOSSES) == set(get_args(LossName))
    help_text = options_of(Config)["data"].help
    assert all(name in help_text for name in datasets.NAMES)


# Written a second time on purpose: a recipe is what everybody trains with who says nothing, and results that are published
# stand on it. Who changes one has to mean it. The numbers of "plane" are those of decision 5.
WRITTEN = {
    "plane": {
        "z_dim": 1, "z": "uniform", "ema": 0.998, "steps": 5000, "batch": 128, "lr_g": 0.002, "lr_d": 0.003, "beta1": 0.0,
        "beta2": 0.99, "decay_from": 0.5, "decay_to": 0.2, "width": 96, "depth": 3, "eval_samples": 10_000,
    },
    "vector": {
        "z_dim": 64, "z": "normal", "ema": 0.998, "steps": 5000, "batch": 256, "lr_g": 0.0005, "lr_d": 0.0005, "beta1": 0.5,
        "beta2": 0.999, "decay_from": 0.5, "decay_to": 0.0, "width": 256, "depth": 3, "eval_samples": 10_000,
    },
    "image": {
        "z_dim": 64, "z": "normal", "ema": 0.995, "steps": 2000, "batch": 64, "lr_g": 0.0005, "lr_d": 0.0005, "beta1": 0.5,
        "beta2": 0.999, "decay_from": 0.5, "decay_to": 0.1, "eval_samples": 2048,
    },
}  # fmt: skip
SHAPES = [((2,), "plane"), ((7,), "vector"), ((1, 28, 28), "image")]


@pytest.mark.parametrize(("shape", "kind"), SHAPES)
def test_the_recipes_are_these_numbers(shape: tuple[int, ...], kind: str) -> None:
    found = resolve(Config(), shape)
    assert {name: getattr(found, name) for name in WRITTEN[kind]} == WRITTEN[kind]
    assert RECIPES[kind].keys() == WRITTEN[kind].keys()
    tenth = 200 if kind == "image" else 500
    assert (found.eval_every, found.save_every) == (tenth, tenth)


@pytest.mark.parametrize(("shape", "kind"), SHAPES)
def test_resolve_fills_in_the_recipe_and_keeps_what_was_said(shape: tuple[int, ...], kind: str) -> None:
    found = resolve(Config(steps=77, z_dim=5), shape)
    assert (found.steps, found.z_dim) == (77, 5)
    assert found.batch == WRITTEN[kind]["batch"]
    unset = {"data_root", "image_size", "generator", "discriminator", "name"}
    unset |= {"width", "depth"} if kind == "image" else set()  # the networks know
    assert {f.name for f in dataclasses.fields(Config) if getattr(found, f.name) is None} == unset


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    st.builds(
        Config,
        data=texts,
        plugin=st.lists(texts, max_size=3).map(tuple),
        lr_g=st.floats(0, 1e3) | st.none(),
        steps=st.integers(1, 10**9) | st.none(),
        threads=st.integers(1, 64) | st.just("auto"),
        options=st.dictionaries(
            st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
            st.dictionaries(
                st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
                texts | st.booleans() | st.integers(-5, 5) | st.floats(-1e9, 1e9),
            ),
            max_size=2,
        ),
    )
)
def test_toml_round_trip(config: Config) -> None:
    import tomllib

    content = tomllib.loads(to_toml(config))
    options = content.pop("options", {})
    assert make(content, options) == config


def test_a_broken_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    for text, message in [("a = ", "not valid TOML"), ("options = 3", "tables")]:
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_toml(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"ema": 1.0},
        {"decay_from": 2},
        {"lr_g": -1},
        {"threads": 0},
        {"stepps": 3},
        {"loss": "hing"},
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        make(values, {})


def test_differences_name_old_and_new() -> None:
    one, two = (
        plain(Config(options={"p": {"weight": 1.0}})),
        plain(Config(steps=3, options={"p": {"weight": 2.0}})),
    )
    assert differences(one, two) == ["options.p.weight: 1.0 -> 2.0", "steps: None -> 3"]
    assert not differences(one, one)
