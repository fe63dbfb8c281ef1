"""Configs: validation, overrides, JSON, the command line and its refusals."""

from typing import Annotated, Literal

import pydantic
import pytest

from distributed_inr.config import config, differences, from_json, override, parse, to_json
from distributed_inr.models import LatentDiffusion
from distributed_inr.models.denoisers import MLP
from distributed_inr.presets import chinr
from distributed_inr.presets.ddmi import PRESETS


@config
class Small:
    kind: Literal["small"] = "small"
    width: Annotated[int, pydantic.Field(gt=0)] = 8
    """Units."""


@config
class Large:
    kind: Literal["large"] = "large"
    depth: int = 3
    sizes: tuple[int, ...] = (1, 2)


@config
class Tree:
    """A config with every kind of field."""

    name: str
    model: Annotated[Small | Large, pydantic.Field(discriminator="kind")] = Small()
    flag: bool = False
    limit: int | None = None
    """Largest count."""
    span: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.name == "forbidden":
            raise ValueError(f"name={self.name} is taken; choose another")


TREES = {"one": lambda: Tree(name="one"), "two": lambda: Tree(name="two", model=Large())}


def read(*argv: str) -> Tree:
    return parse(argv, TREES, default="one", description="A test.")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name):
    experiment = PRESETS[name]()
    assert experiment.name == name
    assert from_json(type(experiment), to_json(experiment)) == experiment


def test_flags_are_read_by_type_and_path():
    tree = read("two", "--model.sizes", "3", "4", "5", "--flag", "true", "--limit", "7")
    assert tree == Tree(name="two", model=Large(sizes=(3, 4, 5)), flag=True, limit=7)
    assert read("--limit", "none").limit is None
    assert read("--span", "-0.5", "1").span == (-0.5, 1.0) and read("--span", "none").span is None


def test_help_shows_defaults_as_they_are_typed(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: none)" in text and "None)" not in text
    assert "One of small, large; another starts from its defaults: give it with --help to see them." in text


def test_a_flag_switches_the_variant_of_a_union_and_sets_its_fields():
    assert read("--model.kind", "large", "--model.depth", "9").model == Large(depth=9)
    assert override(Tree(name="x"), {"model.depth": 4, "model.kind": "large"}).model == Large(depth=4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tow"], ["preset", "'tow'", "two"]),
        (["--limt", "3"], ["flag", "'--limt'", "--limit"]),
        (["--limit", "many"], ["limit='many'", "integer"]),
        (["--model.width", "-3"], ["model.width", "-3", "greater than 0"]),
        (["--flag", "maybe"], ["flag='maybe'", "boolean"]),
        (["--model.kind", "medium"], ["model", "medium", "small", "large"]),
        (["--name", "forbidden"], ["name=forbidden", "choose another"]),
        (["--limit"], ["--limit", "expected one argument"]),
    ],
)
def test_bad_flags_are_refused_in_one_line_that_names_value_and_remedy(argv, words):
    with pytest.raises(ValueError) as caught:
        read(*argv)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_unknown_fields_are_errors_in_overrides_and_files():
    with pytest.raises(ValueError, match="did you mean limit"):
        override(Tree(name="x"), {"limits": 3})
    with pytest.raises(ValueError, match="model.widht is not a field"):
        from_json(Tree, '{"name": "x", "model": {"kind": "small", "widht": 3}}')
    with pytest.raises(ValueError, match="not JSON"):
        from_json(Tree, "name: !!python/object:os.system {}")


def test_configs_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        read().limit = 3  # type: ignore[misc]


def test_numbers_among_a_few_are_read_from_flags():
    experiment = parse(["--scale.zero-stage", "2"], chinr.PRESETS, default="furniture-image", description="")
    assert experiment.scale.zero_stage == 2
    with pytest.raises(ValueError, match="scale.zero_stage='4': Input should be less than or equal to 3"):
        parse(["--scale.zero-stage", "4"], chinr.PRESETS, default="furniture-image", description="")


def test_a_flag_in_the_wrong_place_is_found():
    with pytest.raises(ValueError, match=r"did you mean --autoencoder-training\.optim\.lr\?"):
        parse(["--autoencoder-training.lr", "1"], chinr.PRESETS, default="furniture-image", description="")


def test_differences_name_the_paths_and_both_values():
    assert differences(Tree(name="a"), Tree(name="a", limit=2)) == {"limit": (None, 2)}
    assert differences(Tree(name="a"), Tree(name="a", model=Large()))["model.kind"] == ("small", "large")


def test_kinds_inside_a_kind_can_be_chosen_together():
    changes = {"prior.kind": "latent-diffusion", "prior.denoiser.kind": "mlp", "prior.denoiser.width": "48"}
    changed = override(chinr.furniture_image(), changes)
    assert isinstance(changed.prior, LatentDiffusion) and changed.prior.denoiser == MLP(width=48)
    flags = [word for path, value in changes.items() for word in ("--" + path, value)]
    assert parse(flags, chinr.PRESETS, default="furniture-image", description="") == changed
    with pytest.raises(ValueError, match=r"^prior\.denoser is not a field"):
        override(chinr.furniture_image(), {"prior.kind": "latent-diffusion", "prior.denoser.kind": "mlp"})
