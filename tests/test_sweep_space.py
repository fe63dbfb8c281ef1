"""Search spaces: what they may hold, when their fields apply, and that the bundled ones fit their presets."""

import json
from pathlib import Path

import pytest

from distributed_inr.config import override
from distributed_inr.presets import PRESETS
from distributed_inr.sweeps import study
from distributed_inr.sweeps.space import load_space, shares_autoencoder, trial_name

SHIPPED = {
    "beta_z.py": "ddmi",
    "latent_denoiser.py": "ddmi",
    "num_experts.py": "chinr",
    "condition_bits.py": "chinr",
}


def write_space(folder: Path, text: str) -> Path:
    path = folder / "space.py"
    path.write_text("from ray import tune\n" + text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'SPACE = {"autoencoder.kl_wieght": tune.uniform(0, 1)}',
            "unknown field 'autoencoder.kl_wieght'; did you mean autoencoder.kl_weight?",
        ),
        (
            'SPACE = {"autoencoder.kl_weight": tune.choice(["much"])}',
            "autoencoder.kl_weight='much': Input should be a valid number",
        ),
        ('SPACE = {"autoencoder.kl_weight": tune.grid_search([1e-5, -1])}', "autoencoder.kl_weight=-1: "),
        ('SPACE = {"seed": tune.choice([1, 2])}', "seed cannot be varied: the sweep itself sets it"),
        ('SPACE = {"scale.num_workers": tune.choice([1, 2])}', "scale.num_workers cannot be varied"),
        (
            'SPACE = {"prior.denoiser.width": tune.choice([8])}\nONLY_IF = {"prior.denoiser.width": {"prior.kind": 1}}',
            "ONLY_IF names prior.kind, which SPACE does not hold",
        ),
    ],
)
def test_what_does_not_fit_the_experiment_is_named_before_anything_runs(tmp_path: Path, text: str, message: str):
    space = load_space(write_space(tmp_path, text))
    with pytest.raises(ValueError) as raised:
        space.check(PRESETS["ddmi"]["furniture-image"]())
    assert f"{space.path}: {message}" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must define SPACE, a dict from field paths to distributions"),
        ("SPACE = {}", "must define SPACE"),
        ("SPACE = [1]", "must define SPACE"),
        ("1 / 0", "cannot be run: ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_defines_no_space_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError) as raised:
        load_space(write_space(tmp_path, text))
    assert message in str(raised.value)


def test_a_file_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere\.py is no file; .* tune_spaces/beta_z\.py"):
        load_space(tmp_path / "nowhere.py")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_space_fits_every_preset_of_its_family(name: str):
    space = load_space(Path("tune_spaces") / name)
    presets = [preset() for preset in PRESETS[SHIPPED[name]].values()]
    fitting = [p for p in presets if name != "condition_bits.py" or p.prior.kind == "hierarchical-diffusion"]
    for preset in fitting:
        space.check(preset)
    assert len(fitting) >= 3 and {path.name for path in Path("tune_spaces").glob("*.py")} == set(SHIPPED)


def test_the_studies_take_what_is_there():
    for one in (study.BETA_Z, study.NUM_EXPERTS, study.CONDITION_BITS):
        assert one.space.is_file() and one.preset in PRESETS[one.family]


def test_a_field_is_varied_only_where_its_condition_holds():
    space = load_space(Path("tune_spaces/latent_denoiser.py"))
    drawn = {path: field.sample() for path, field in space.fields.items()}
    mlp = space.applicable({**drawn, "prior.denoiser.kind": "mlp"})
    unet = space.applicable({**drawn, "prior.denoiser.kind": "unet"})
    assert {path.rpartition(".")[2] for path in mlp} == {"kind", "width", "lr"}
    assert {path.rpartition(".")[2] for path in unet} == {"kind", "channels", "multipliers", "lr"}
    preset = PRESETS["ddmi"]["furniture-image"]()
    assert override(preset, mlp).prior.denoiser.width == mlp["prior.denoiser.width"]  # type: ignore[union-attr]
    assert override(preset, unet).prior.denoiser.channels == unet["prior.denoiser.channels"]  # type: ignore[union-attr]


def test_a_grid_becomes_a_choice_for_searches_that_learn():
    from ray import tune  # not above: Ray reads its token when it is first imported, before there is a cluster of ours

    space = load_space(Path("tune_spaces/condition_bits.py"))
    assert space.is_grid and not load_space(Path("tune_spaces/latent_denoiser.py")).is_grid
    field = space.without_grids(tune.choice)["prior.condition_bits"]
    assert {field.sample() for _ in range(200)} == {0, 4, 8, 12, 15, 20}


def test_a_trial_is_called_by_its_values_and_no_two_by_one_name():
    assert trial_name({"prior.condition_bits": 8}, 1) == "condition_bits=8,seed=1"
    same_last = {"autoencoder.width": 8, "prior.denoiser.width": 9}
    assert trial_name(same_last, 0) == "autoencoder.width=8,prior.denoiser.width=9,seed=0"
    assert trial_name({"a.lr": 1e-05}, 0) == "lr=1e-05,seed=0"
    awkward = [
        trial_name({"a.place": place}, 0) for place in ("s3://a/b", "s3:__a_b", "s3://a b", "x" * 300, "x" * 301)
    ]
    assert len(set(awkward)) == 5 and all("/" not in name and len(name) < 128 for name in awkward)


def test_a_trial_keeps_its_name_through_json():
    values = {"prior.denoiser.multipliers": (1, 2), "prior_training.optim.lr": 0.1 + 0.2}
    assert trial_name(values, 0) == trial_name(json.loads(json.dumps(values)), 0)


def test_a_condition_on_a_field_that_does_not_apply_does_not_hold(tmp_path: Path):
    text = """SPACE = {name: tune.choice([1, 2]) for name in ("a", "b", "c")}
ONLY_IF = {"b": {"a": 1}, "c": {"b": 2}}"""
    space = load_space(write_space(tmp_path, text))
    assert space.applicable({"a": 2, "b": 2, "c": 1}) == {"a": 2}
    assert space.applicable({"a": 1, "b": 2, "c": 1}) == {"a": 1, "b": 2, "c": 1}


@pytest.mark.parametrize(
    ("one", "preset", "changes", "fields", "message"),
    [
        ("BETA_Z", "furniture-image", {"evaluation.num_samples": 1}, [], "evaluation.num_samples=1 leaves out"),
        ("CONDITION_BITS", "furniture-image-mnif", {}, [], "prior.kind=latent-diffusion has no conditions"),
        ("NUM_EXPERTS", "furniture-image", {}, ["prior.condition_bits"], "prior.condition_bits would change nothing"),
    ],
)
def test_what_a_study_cannot_measure_is_refused(one: str, preset: str, changes: dict, fields: list, message: str):
    asked = getattr(study, one)
    experiment = override(PRESETS[asked.family][preset](), changes)
    with pytest.raises(ValueError, match=message):
        asked.check(experiment, fields)


def test_only_fields_of_the_prior_leave_the_autoencoder_to_be_shared():
    assert shares_autoencoder(["prior.condition_bits", "prior_training.optim.lr", "sampling.steps"])
    assert not shares_autoencoder(["prior.condition_bits", "autoencoder.kl_weight"])
    assert not shares_autoencoder(["domain.size"]) and not shares_autoencoder(["data.num_streams"])
