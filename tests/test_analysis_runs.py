"""Analyses of real runs at tiny size."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL.Image import Transpose
from safetensors.torch import load_file, save_file
from tiny_run import smooth_picture
from torch import Tensor
from trained_runs import DIM, LAYERS, SIGNALS, chinr, ddmi

import distributed_inr as dinr
from distributed_inr import analysis, randomness
from distributed_inr.analysis import conditioning, sources
from distributed_inr.analysis.neighbours import true_pictures
from distributed_inr.config import override
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.domains.domain import seeds_for
from distributed_inr.evaluation import metrics
from distributed_inr.evaluation.splits import Split, spread
from distributed_inr.generation import FieldModel
from distributed_inr.models.d2c_vae import D2CVAEModel
from distributed_inr.models.hierarchical_diffusion import HierarchicalDiffusionModel


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chinr(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chinr(tmp_path_factory.getbasetemp(), name="unconditional", condition_bits=0)


@pytest.fixture(scope="module")
def planes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ddmi(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def model(run: Path) -> FieldModel:
    return dinr.load(run)


def prior_of(model: FieldModel) -> HierarchicalDiffusionModel:
    assert isinstance(model.prior, HierarchicalDiffusionModel)
    return model.prior


# --- where latents come from


def test_training_and_held_out_latents_are_what_the_autoencoder_makes_of_the_signals(model: FieldModel):
    latents = analysis.training_latents(model)
    split = Split(model, model.experiment.data.train)
    assert len(latents) == SIGNALS and latents.keys == latents.signals
    for row in (0, 17, 39):
        signal = split.one(row)
        assert latents.keys[row] == signal.key[0]
        torch.testing.assert_close(latents.values[row], model.autoencoder.encode(signal)[0], rtol=1e-4, atol=1e-7)
    held_out = analysis.choose(model, "held-out", count=2)
    assert held_out.keys == ["0001", "0003"]
    assert model.experiment.data.val is not None
    expected = model.autoencoder.encode(Split(model, model.experiment.data.val).one(3))[0]
    torch.testing.assert_close(held_out.values[1], expected, rtol=1e-4, atol=1e-7)


def test_signals_are_chosen_by_number_or_evenly_spaced(model: FieldModel, tmp_path: Path):
    everything = analysis.training_latents(model)
    chosen = analysis.choose(model, "training", numbers=[5, 2])
    assert torch.equal(chosen.values, everything.values[[5, 2]])
    assert torch.equal(analysis.choose(model, "training", count=4).values, everything.values[spread(SIGNALS, 4)])
    drawn = analysis.choose(model, "samples", numbers=[3, 0], seed=8)
    torch.testing.assert_close(drawn.values, model.sample_latents(4, seed=8)[[3, 0]], rtol=1e-4, atol=1e-8)
    assert drawn.keys == ["seed 8, sample 3", "seed 8, sample 0"]
    smooth_picture(4, 16).save(tmp_path / "own.png")
    own = analysis.file_latents(model, [tmp_path / "own.png"])
    assert own.keys == ["own.png"] and own.values.shape == (1, LAYERS, DIM)
    with pytest.raises(ValueError, match=rf"number 40 must lie in 0\.\.39: there are {SIGNALS} training latents"):
        analysis.choose(model, "training", numbers=[40])


def test_latents_of_another_autoencoder_are_refused(run: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = load_file(copy / "autoencoder" / "model.safetensors")
    save_file({name: value + 1e-4 for name, value in weights.items()}, copy / "autoencoder" / "model.safetensors")
    with pytest.raises(ValueError, match="latents was written by another autoencoder: sha256 .* in .*; delete"):
        analysis.training_latents(dinr.load(copy))

    stage = copy / "latents" / "stage.json"
    record = json.loads(stage.read_text())
    stage.write_text(json.dumps(record | {"complete": False}))
    with pytest.raises(ValueError, match="latents is not complete; run the training job"):
        analysis.training_latents(dinr.load(copy))
    stage.write_text("{")
    with pytest.raises(ValueError, match=r"stage\.json cannot be read: JSONDecodeError"):
        analysis.training_latents(dinr.load(copy))
    shutil.rmtree(copy / "latents")
    with pytest.raises(ValueError, match="there are no training latents; run the training job"):
        analysis.training_latents(dinr.load(copy))


# --- control


def test_every_node_of_a_tree_is_drawn_again_to_the_bit_from_its_path(model: FieldModel):
    found = analysis.tree(model, fix_layers=[1, 3], branches=2, seed=5)
    assert list(found.nodes) == [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    for path, node in found.nodes.items():
        assert torch.equal(analysis.redraw(model, found, path), node.latent)
        parent = found.nodes.get(path[:-1])
        if path and parent is not None:
            assert node.seed == randomness.sample_seed(parent.seed, path[-1])
            prefix = parent.latent[None, : parent.fixed]
            again = prior_of(model).sample(torch.tensor([node.seed]), prefix=prefix, sampler="ddim", steps=3)
            assert torch.equal(again[0], node.latent)
        assert torch.equal(prior_of(model).bits(node.latent[None])[0], node.bits)
    wider = analysis.tree(model, fix_layers=[1, 3], branches=3, seed=5)
    assert all(torch.equal(wider.nodes[path].latent, node.latent) for path, node in found.nodes.items())


def test_children_hold_their_parents_layers_exactly_and_differ_in_the_next(model: FieldModel):
    found = analysis.tree(model, fix_layers=[1, 2], branches=2, seed=5)
    for node in found.nodes.values():
        children = found.children(node.path)
        assert len(children) == (2 if len(node.path) < 2 else 0)
        for child in children:
            assert child.fixed == node.fixed + 1
            assert torch.equal(child.latent[: node.fixed], node.latent[: node.fixed])
            assert (child.latent[node.fixed :] - node.latent[node.fixed :]).abs().min() > 0
        if children:
            assert not torch.equal(children[0].latent[node.fixed], children[1].latent[node.fixed])
    samples = model.sample_latents(2, seed=5)
    first = torch.stack([child.latent for child in found.children(())])
    torch.testing.assert_close(first, samples, rtol=1e-4, atol=1e-8)
    other = analysis.tree(model, fix_layers=[1], branches=1, seed=6)
    assert not torch.equal(other.nodes[(0,)].latent, found.nodes[(0,)].latent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fix_layers": [2, 1]}, r"fix_layers=\[2, 1\] must be one or more rising numbers"),
        ({"fix_layers": []}, r"fix_layers=\[\] must be one or more rising numbers"),
        ({"fix_layers": [5]}, r"layer=5 must lie in 1\.\.4"),
        ({"branches": 7}, r"branches=7 over 3 generations make 343 leaves, and 1\.\.256 fit"),
        ({"branches": 0}, r"branches=0 over 3 generations"),
        ({"steps": 0}, "steps=0 must lie in"),
    ],
)
def test_trees_that_cannot_be_are_refused(model: FieldModel, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        analysis.tree(model, **options)


# --- neighbours


def test_retrieval_finds_the_nearest_by_z_scores_but_not_the_signal_itself(
    model: FieldModel, monkeypatch: pytest.MonkeyPatch
):
    everything = analysis.training_latents(model)
    query = analysis.choose(model, "training", numbers=[4, 30])
    for layer in (None, 3):
        found = analysis.retrieval(model, query, layer=layer, count=3)
        scores = prior_of(model).normalise(everything.values)
        scores = scores.flatten(1) if layer is None else scores[:, layer - 1]
        distances = (scores[[4, 30], None] - scores).norm(dim=2)
        distances[[0, 1], [4, 30]] = torch.inf
        expected, order = distances.sort(1)
        torch.testing.assert_close(found.distances, expected[:, :3], rtol=1e-4, atol=1e-5)
        assert found.keys == [[everything.keys[i] for i in row[:3]] for row in order.tolist()]
        assert torch.equal(found.values, everything.values[order[:, :3]])
        with monkeypatch.context() as patch:  # however many are read together
            patch.setattr(sources, "_READ_TOGETHER", 7)
            again = analysis.retrieval(model, query, layer=layer, count=3)
        assert again.keys == found.keys and torch.equal(again.distances, found.distances)


def test_retrieval_finds_a_planted_neighbour_by_all_layers_or_by_one(model: FieldModel):
    known = analysis.training_latents(model)
    noise = torch.randn(known.values.shape, generator=torch.Generator().manual_seed(0))
    near = dataclasses.replace(known, values=known.values + 1e-3 * noise * known.values.std(0), source="files")
    found = analysis.retrieval(model, near, count=1)
    assert [keys[0] for keys in found.keys] == known.keys
    values = known.values.roll(1, 0)
    values[:, 2] = known.values[:, 2]
    mixed = dataclasses.replace(near, values=values)
    found = analysis.retrieval(model, mixed, layer=3, count=1)
    assert [keys[0] for keys in found.keys] == known.keys and not found.distances.any()
    assert [keys[0] for keys in analysis.retrieval(model, mixed, count=1).keys] != known.keys


def test_a_signals_mirrored_copy_is_not_its_neighbour(planes: Path):
    model = dinr.load(planes)
    latents = analysis.training_latents(model)
    assert len(latents) == 12 and {"0002", "0002#1"} <= set(latents.keys)
    query = analysis.choose(model, "training", numbers=[latents.keys.index("0002")])
    found = analysis.retrieval(model, query, count=10)
    assert sorted(found.keys[0]) == sorted(key for key in latents.keys if key[:4] != "0002")
    with pytest.raises(ValueError, match="count=11: .*/latents has 10 training signals besides"):
        analysis.retrieval(model, query, count=11)
    # An own file of that name is another signal.
    own = dataclasses.replace(query, source="files")
    assert analysis.retrieval(model, own, count=1).keys == [["0002"]]


def test_copies_lie_at_no_distance_and_others_at_their_own(model: FieldModel):
    experiment = override(model.experiment, {"data.val": model.experiment.data.train})
    found = analysis.memorisation(dataclasses.replace(model, experiment=experiment), count=SIGNALS)
    assert found.held_out is not None and found.held_out_functions is not None
    assert torch.equal(found.held_out, torch.zeros(SIGNALS))
    assert found.held_out_functions.min() > 0.1 and found.training_pictures == SIGNALS

    split = Split(model, model.experiment.data.train)
    known = torch.stack([true_pictures(split.domain, split.one(number))[0] for number in range(SIGNALS)])
    samples = model.sample(3, seed=0).render(8)
    expected = (samples[:, None] - known).flatten(2).norm(dim=2).min(1)
    torch.testing.assert_close(found.samples[:3], expected.values, rtol=1e-4, atol=1e-4)
    for (sample, nearest), own, place in zip(found.shown, samples, expected.indices, strict=False):
        torch.testing.assert_close(sample, own, rtol=0, atol=1e-4)
        torch.testing.assert_close(nearest, known[place])


def test_a_mirrored_copy_of_a_training_picture_is_a_copy_where_training_mirrored(planes: Path, tmp_path: Path):
    model = dinr.load(planes)
    writer = ShardWriter(tmp_path, domain="image", protocol={"made": "for tests"})
    for number in range(2):
        file = io.BytesIO()
        smooth_picture(3000 + number).transpose(Transpose.FLIP_LEFT_RIGHT).save(file, "PNG")
        writer.write({"__key__": str(number), "png": file.getvalue()})
    writer.close()
    plain = analysis.memorisation(model, count=2)
    assert plain.held_out is None and plain.training_pictures == 6 and plain.resolution == 16
    experiment = override(model.experiment, {"data.val": str(tmp_path)})
    found = analysis.memorisation(dataclasses.replace(model, experiment=experiment), count=2)
    assert found.held_out is not None and found.held_out.max() < 1e-5
    torch.testing.assert_close(found.samples, plain.samples, rtol=1e-5, atol=1e-5)
    experiment = override(experiment, {"domain.flip": False})
    found = analysis.memorisation(dataclasses.replace(model, experiment=experiment), count=2)
    assert found.held_out is not None and found.held_out.min() > 0.1


# --- layers under conditions


class Oracle(torch.nn.Module):
    """The best denoiser of normal latents whose mean the bits move, and whose deviation falls from layer to layer:
    E[x0 | xt], in closed form.
    """

    def __init__(self, levels: Tensor, *, spread: float, shift: float) -> None:
        super().__init__()
        self.levels, self.spread, self.shift = levels, spread, shift

    def forward(self, noisy: Tensor, timesteps: Tensor, layers: Tensor, bits: Tensor, text: None = None) -> Tensor:
        level, variance = self.levels[timesteps][:, None], (self.spread / (1 + layers[:, None])) ** 2
        mean = self.shift * (2 * bits - 1).sum(1, keepdim=True)
        return (level.sqrt() * variance * noisy + (1 - level) * mean) / (level * variance + 1 - level)


def with_oracle(model: FieldModel, *, spread: float, shift: float) -> FieldModel:
    prior = model.experiment.prior.build(model.autoencoder.latent_shape)
    assert isinstance(prior, HierarchicalDiffusionModel)
    prior.load_state_dict(prior_of(model).state_dict())
    prior.denoisers = torch.nn.ModuleList([Oracle(prior.chain.signal_level, spread=spread, shift=shift)])
    return dataclasses.replace(model, prior=prior.eval().requires_grad_(False))


def test_deviations_within_conditions_and_over_all_are_the_oracles(model: FieldModel):
    oracle = with_oracle(model, spread=0.8, shift=0.7)
    found = analysis.deviations(oracle, count=4, samples=300, steps=200)
    bits = prior_of(model).bits(analysis.training_latents(model).values)
    of = torch.arange(1200) % SIGNALS
    for layer in found:
        spread, means = 0.8 / layer.layer, 0.7 * (2 * bits[of, layer.layer - 1] - 1).sum(1)
        overall = (spread**2 + means.var()) ** 0.5
        assert layer.within.shape == (4, DIM)
        torch.testing.assert_close(layer.within, torch.full((4, DIM), spread).double(), rtol=0.15, atol=0)
        figures = layer.figures
        assert figures["within"] == pytest.approx(spread, rel=0.03)
        assert figures["unconditional"] == pytest.approx(overall.item(), rel=0.04)
        assert figures["ratio"] == pytest.approx(spread / overall.item(), rel=0.05)
        scale = prior_of(model).latent_deviation[layer.layer - 1].double()
        torch.testing.assert_close(layer.scale, scale)
        assert figures["within_raw"] == pytest.approx((layer.within * scale).mean().item())
        assert figures["alone"] == analysis.share_alone(bits[:, layer.layer - 1])
    assert found[0].figures["ratio"] == pytest.approx(1, abs=0.04)  # layer 1 has no condition
    assert found[1].figures["ratio"] < 0.7


def test_without_conditions_the_two_deviations_are_alike(unconditional: Path):
    found = analysis.deviations(dinr.load(unconditional), count=3, samples=600, steps=10)
    assert [layer.layer for layer in found] == list(range(1, LAYERS + 1))
    assert all(layer.figures["ratio"] == pytest.approx(1, abs=0.06) and layer.alone == 0 for layer in found)


def test_draws_under_conditions_lie_where_the_oracle_puts_them(model: FieldModel, monkeypatch: pytest.MonkeyPatch):
    oracle = with_oracle(model, spread=0.2, shift=1.0)
    found = analysis.conditions(oracle, count=3, samples=100, steps=50)
    training = prior_of(model).normalise(analysis.training_latents(model).values)
    for layer in found.layers:
        components = analysis.principal_components(training[:, layer.layer - 1])
        torch.testing.assert_close(layer.training, components.project(training[:, layer.layer - 1]))
        own = components.project(prior_of(model).normalise(found.signals)[:, layer.layer - 1])
        torch.testing.assert_close(layer.chosen, own)
        means = (2 * layer.bits - 1).sum(1, keepdim=True).expand(-1, DIM)
        expected = components.project(means)
        torch.testing.assert_close(layer.samples.mean(1), expected, rtol=0, atol=0.12)
        seeds, under = seeds_for(0, 300, start=3), layer.bits.repeat_interleave(100, dim=0)  # after the signals' own
        drawn = prior_of(oracle).sample_layer(layer.layer - 1, under, seeds, steps=50)
        again = components.project(drawn).unflatten(0, (3, 100))
        torch.testing.assert_close(layer.samples, again, rtol=0, atol=1e-4)
        spread = (again.var(1).sum(1) / layer.training.var(0).sum()).sqrt()
        torch.testing.assert_close(layer.spread, spread, rtol=1e-3, atol=0)
    assert not found.layers[0].bits.any()
    monkeypatch.setattr(conditioning, "_DRAWN_TOGETHER", 64)
    repeated = analysis.conditions(oracle, count=3, samples=100, steps=50)
    for layer, same in zip(found.layers, repeated.layers, strict=True):
        torch.testing.assert_close(layer.samples, same.samples, rtol=0, atol=1e-4)


def test_clusters_know_their_signals_codes(model: FieldModel):
    found = analysis.clusters(model, count=3, neighbours=4)
    latents = analysis.training_latents(model)
    bits = prior_of(model).bits(latents.values)
    for layer in found:
        assert layer.codes_of == min(layer.layer + 1, LAYERS)
        assert torch.equal(layer.codes, bits[:, layer.codes_of - 1])
        scores = prior_of(model).normalise(latents.values)[:, layer.layer - 1]
        assert torch.equal(layer.clusters.labels, analysis.k_means(scores, 3).labels)
        assert layer.anchors.tolist() == [10, 20, 29]
        for anchor, nearest in zip(layer.anchors, layer.nearest, strict=True):
            apart = (layer.codes - layer.codes[anchor]).abs().sum(1)
            assert apart[nearest].tolist() == apart.sort().values[:4].tolist()
        for cluster in range(3):
            members = layer.codes[layer.clusters.labels == cluster]
            code = (members.mean(0) > 0.5).float()
            assert torch.equal(layer.cluster_codes[cluster], code)
            assert layer.within[cluster].item() == pytest.approx((members - code).abs().sum(1).mean().item())


# --- spectra, and one prior against another


def test_spectra_are_those_of_the_basis_fields_whatever_the_batches(planes: Path):
    model = dinr.load(planes)
    latents = analysis.choose(model, "training", count=7)
    found = analysis.frequencies(model, latents)
    assert [field.cells for field in found.fields] == [4, 8, 16]
    assert isinstance(model.autoencoder, D2CVAEModel)
    with torch.no_grad():
        basis = model.autoencoder.basis(latents.values)
    for field, (plane,) in zip(found.fields, basis, strict=True):
        expected = analysis.radial_power(plane.flatten(0, 1))
        torch.testing.assert_close(field.power, expected, rtol=1e-4, atol=1e-9)
        assert field.shares.sum().item() == pytest.approx(1)
        assert field.shares[: field.below(0.9)].sum() < 0.9 <= field.shares[: field.below(0.9) + 1].sum()
    other = override(model.experiment, {"evaluation.batch_size": 2})
    again = analysis.frequencies(dataclasses.replace(model, experiment=other), latents)
    for field, same in zip(found.fields, again.fields, strict=True):
        torch.testing.assert_close(field.power, same.power, rtol=1e-4, atol=1e-9)


def test_an_ablation_measures_both_priors_on_the_same_pictures(model: FieldModel, unconditional: Path):
    other = dinr.load(unconditional)
    found = analysis.ablation(model, other, count=8, seed=2)
    assert found.same_autoencoder  # trained alike, from one seed
    network = metrics.EfficientNetLite0()
    split = Split(model, model.experiment.data.train)
    with torch.no_grad():
        reference = network(torch.cat([true_pictures(split.domain, s) for s in split.batches(split.spread(16))]))
        for arm, run in ((found.conditional, model), (found.unconditional, other)):
            pictures = run.sample(8, seed=2).render(8)
            torch.testing.assert_close(arm.pictures, pictures, rtol=0, atol=1e-4)
            assert arm.kid == pytest.approx(metrics.kid(network(pictures), reference)[0], rel=1e-3)
            copied = analysis.memorisation(run, count=8, seed=2)
            torch.testing.assert_close(arm.memorisation.samples, copied.samples)
    assert (found.conditional.condition_bits, found.unconditional.condition_bits) == (2, 0)
    assert found.held_out_kid is not None and found.training_pictures == 16
    with pytest.raises(ValueError, match="condition_bits is 0 in .* and 2 in .*; give a run with"):
        analysis.ablation(other, model, count=8)
    moved = dataclasses.replace(other, experiment=override(other.experiment, {"data.train": "elsewhere"}))
    with pytest.raises(
        ValueError, match="^data.train is .* in .*tiny and elsewhere in .*: an ablation compares priors"
    ):
        analysis.ablation(model, moved, count=8)
