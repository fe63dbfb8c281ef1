"""A finished run as a model whose samples are functions."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file
from tiny_run import smooth_picture, write_run

import distributed_inr as dinr
from distributed_inr.config import differences
from distributed_inr.domains.domain import collate, pixel_centres
from distributed_inr.evaluation.metrics import psnr
from distributed_inr.files import default_folder, export, reconstruct_files, sample_files
from distributed_inr.presets.ddmi import PRESETS

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("generation"))


def read_picture(path: Path) -> torch.Tensor:
    with PillowImage.open(path) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def test_samples_are_functions_of_seed_and_number_alone(run: Path):
    model = dinr.load(run)
    latents = model.sample_latents(5, seed=3)
    assert torch.equal(latents, dinr.load(run).sample_latents(5, seed=3))
    torch.testing.assert_close(model.sample_latents(2, seed=3, start=3), latents[3:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.sample_latents(1, seed=3, start=4), latents[4:], rtol=1e-4, atol=1e-5)
    assert (model.sample_latents(5, seed=4) - latents).abs().amin(0).max() > 1e-2
    assert len(torch.unique(latents.flatten(1), dim=0)) == 5


def test_coordinates_of_other_shapes_are_one_clear_line(run: Path):
    """In a process of its own: here, types are checked before the function is called."""
    program = f"""
import torch
import distributed_inr as dinr
fields = dinr.load({str(run)!r}).sample(2, steps=2)
coords, view = torch.zeros(2, 5, 2), torch.zeros(2, 5, 1)
assert torch.equal(fields(coords), fields(coords, view))
for given in ([coords[0]], [coords[:1]], [coords[..., :1]], [coords[..., None]], [coords, view[..., 0]]):
    try:
        fields(*given)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    wrong = ["coords of shape [5, 2]", "coords of shape [1, 5, 2]", "coords of shape [2, 5, 1]"]
    wrong += ["coords of shape [2, 5, 2, 1]", "view of shape [2, 5]"]
    lines = done.stdout.splitlines()
    assert len(lines) == len(wrong), done.stderr
    assert all(line.startswith(start) for line, start in zip(lines, wrong, strict=True))
    assert "must be [2, points, 2]: functions" in lines[0] and "must be [2, 5, 1]: functions" in lines[-1]


def test_an_exported_run_draws_the_same_functions_from_half_the_bytes(run: Path, tmp_path: Path):
    (run / "samples-16.png").write_bytes(b"a picture")
    out = tmp_path / "shared" / "tiny"
    export(run, out)
    assert (out / "samples-16.png").read_bytes() == b"a picture"
    assert dinr.load(out).experiment.output == "./runs"  # and not where it was trained
    for name in ("autoencoder", "prior"):
        assert all(tensor.dtype == torch.float16 for tensor in load_file(out / name / "model.safetensors").values())
    exact, exported = (dinr.load(folder).sample(3, steps=4).render(16) for folder in (run, out))
    assert 0 < (exact - exported).abs().max() < 0.05
    with pytest.raises(ValueError, match=r"tiny exists; choose another folder with --out, or delete it"):
        export(run, out)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm-solver++"])
def test_samples_do_not_depend_on_how_many_are_drawn_together(tmp_path: Path, sampler: str):
    whole = dinr.load(write_run(tmp_path / "whole"))
    parts = dinr.load(write_run(tmp_path / "parts", sampling__batch_size=2))
    settings = {"seed": 1, "sampler": sampler, "steps": 7}
    torch.testing.assert_close(
        parts.sample_latents(5, **settings), whole.sample_latents(5, **settings), rtol=1e-4, atol=1e-5
    )


def test_a_field_is_independent_of_how_it_is_queried(run: Path):
    model = dinr.load(run)
    fields, resolution = model.sample(2, seed=0), 48
    whole = fields.render(resolution)
    assert whole.shape == (2, 3, resolution, resolution) and whole.min() >= 0 and whole.max() <= 1
    assert whole.std() > 0.01
    torch.testing.assert_close(model.domain.render(fields, resolution, chunk_points=100), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(fields[1].render(resolution), whole[1:], rtol=0, atol=1e-6)

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(resolution, (2, 1000), generator=generator)
    centres = pixel_centres(resolution)
    coords = torch.stack([centres[x], centres[y]], dim=-1).expand(2, -1, -1)
    view = model.domain._view(torch.full((2,), resolution), 1000)
    values = (fields(coords, view) + 1) / 2
    torch.testing.assert_close(values.clamp(0, 1), whole[:, :, y, x].transpose(1, 2), rtol=0, atol=1e-6)
    alone = torch.cat([fields(coords[:, [i]], view[:, [i]]) for i in range(20)], dim=1)
    torch.testing.assert_close((alone + 1) / 2, values[:, :20], rtol=0, atol=1e-6)


def test_coordinates_alone_are_read_at_the_base_resolution(run: Path):
    fields = dinr.load(run).sample(2)
    size, centres = 16, pixel_centres(16)
    coords = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1).view(1, -1, 2).expand(2, -1, -1)
    values = ((fields(coords) + 1) / 2).clamp(0, 1).transpose(1, 2).unflatten(2, (size, size))
    torch.testing.assert_close(values, fields.render(size), rtol=0, atol=1e-6)


def test_fields_can_be_differentiated_by_coordinates(run: Path):
    fields = dinr.load(run).sample(1)
    coords = torch.zeros(1, 3, 2, requires_grad=True)
    fields(coords, torch.zeros(1, 3, 1)).sum().backward()
    assert coords.grad is not None and coords.grad.abs().sum() > 0


def test_float16_weights_are_read_as_float32(tmp_path: Path):
    model = dinr.load(write_run(tmp_path, dtype=torch.float16))
    weights = [*model.autoencoder.parameters(), *model.prior.parameters()]
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert not any(weight.requires_grad for weight in weights)
    assert not model.autoencoder.training and not model.prior.training
    assert model.sample(1).render(16).std() > 0.01


def test_ones_own_picture_becomes_a_function(run: Path, tmp_path: Path):
    model = dinr.load(run)
    for number in (0, 1):
        smooth_picture(number, 40).save(tmp_path / f"{number}.png")
    both = model.encode([tmp_path / "0.png", str(tmp_path / "1.png")])
    assert len(both) == 2
    rendered = both.render(20)
    torch.testing.assert_close(model.encode(tmp_path / "1.png").render(20), rendered[1:], rtol=0, atol=1e-6)
    assert (rendered[0] - rendered[1]).abs().max() > 1e-3

    pixels = (read_picture(tmp_path / "0.png") * 255).round().to(torch.uint8)
    signal = model.domain.signal(pixels, key="own")
    torch.testing.assert_close(model.encode(signal).render(20), rendered[:1], rtol=0, atol=1e-6)


def test_pictures_with_rotation_or_transparency_are_read_as_they_look(run: Path, tmp_path: Path):
    model = dinr.load(run)
    picture = smooth_picture(5, 32)
    picture.save(tmp_path / "upright.png")
    exif = PillowImage.Exif()
    exif[0x0112] = 6  # stored a quarter turn from upright
    picture.transpose(PillowImage.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright, turned = (model.encode(tmp_path / f"{name}.png").render(16) for name in ("upright", "turned"))
    torch.testing.assert_close(turned, upright, rtol=0, atol=1e-6)


def test_sample_files_hold_the_rendered_functions(run: Path, tmp_path: Path):
    model = dinr.load(run)
    paths = sample_files(model, tmp_path, count=3, resolution=24, seed=9)
    assert [path.name for path in paths] == [
        "seed9-24px-000.png",
        "seed9-24px-001.png",
        "seed9-24px-002.png",
        "seed9-24px-sheet.png",
    ]
    expected = model.sample(3, seed=9).render(24)
    for path, picture in zip(paths, expected, strict=False):
        torch.testing.assert_close(read_picture(path), picture, rtol=0, atol=0.51 / 255)


def test_options_that_a_file_does_not_have_are_refused_before_anything_is_written(run: Path, tmp_path: Path):
    model = dinr.load(run)
    sample_files(model, tmp_path / "all", count=1, options={"frames": None, "width": None, "fps": None})
    with pytest.raises(
        ValueError, match="frames=8: the .png of a picture has only a resolution, in px; leave frames out"
    ):
        sample_files(model, tmp_path / "none", options={"frames": 8})
    assert not (tmp_path / "none").exists()


def test_reconstructions_keep_pictures_of_one_name_apart(run: Path, tmp_path: Path):
    model = dinr.load(run)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        smooth_picture(ord(folder), 64).save(tmp_path / folder / "chair.png")
    files = [tmp_path / "a" / "chair.png", tmp_path / "b" / "chair.png"]
    paths = reconstruct_files(model, files, tmp_path / "out", resolution=100)
    assert len(set(paths)) == 4 and all(path.is_file() for path in paths)
    with PillowImage.open(paths[0]) as picture:
        assert picture.size == (100, 100)
    assert paths[0].read_bytes() != paths[2].read_bytes()


def test_outputs_go_to_the_working_directory_when_the_run_is_read_only(run: Path, monkeypatch: pytest.MonkeyPatch):
    assert default_folder(run, "samples") == run / "samples"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert default_folder(run, "samples") == Path("samples")


def test_a_run_without_a_prior_encodes_but_does_not_sample(tmp_path: Path):
    run = write_run(tmp_path)
    (run / "prior" / "model.safetensors").unlink()
    smooth_picture(0).save(tmp_path / "own.png")
    model = dinr.load(run)
    assert model.encode(tmp_path / "own.png").render(16).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"prior/model\.safetensors does not exist"):
        model.sample(1)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path):
    run = write_run(tmp_path)
    path = run / "autoencoder" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "readout.out.bias": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=r"readout\.out\.bias is \[5\] in the file and \[3\] in the model"):
        dinr.load(run)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        dinr.load(run)


def test_sampling_needs_no_ray_deepspeed_accelerate_or_webdataset(run: Path):
    program = f"""
import sys
for name in ("ray", "deepspeed", "accelerate", "webdataset"):
    sys.modules[name] = None  # importing it fails
import distributed_inr as dinr
assert "torch" not in sys.modules  # the package itself is light
print(tuple(dinr.load({str(run)!r}).sample(2).render(16).shape))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "(2, 3, 16, 16)", done.stderr


@pytest.mark.slow
def test_rendering_4096_pixels_stays_under_a_gib_above_the_model(tmp_path: Path):
    # A narrow model at 4096 pixels; and the published read-out, which sets a chunk's memory, on a few chunks.
    narrow = write_run(tmp_path / "narrow")
    published = {"field_channels": 64, "readout_width": 256, "readout_blocks": 4}
    wide = write_run(tmp_path / "wide", **{f"autoencoder__{name}": value for name, value in published.items()})
    gib = [peak_of_rendering(narrow, 4096, tmp_path), peak_of_rendering(wide, 400, tmp_path)]
    print(f"above the model: {gib[0]:.2f} GiB for 4096 x 4096, {gib[1]:.2f} GiB for chunks of the published read-out")
    picture = 4096 * 4096 * 3 * 4 / 2**30
    assert picture < gib[0] < 1.0
    assert gib[1] + picture < 1.0


def peak_of_rendering(run: Path, resolution: int, folder: Path) -> float:
    """GiB above the loaded model that rendering and writing one picture takes, in a process of its own."""
    program = f"""
from pathlib import Path
import distributed_inr as dinr
def peak():  # of this program: what getrusage gives may be the peak of the process that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20
fields = dinr.load({str(run)!r}).sample(1)
fields.render(16)
before = peak()
fields.domain.save(fields.render({resolution})[0], Path({str(folder)!r}) / "picture.png")
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def job(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "jobs" / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={"PYTHONPATH": str(REPOSITORY)})


@pytest.mark.slow
def test_the_sample_job_prints_the_files_it_wrote(run: Path, tmp_path: Path):
    done = job("sample", run, "--count", 2, "--resolution", 20, "--steps", 3, "--out", tmp_path / "out", cwd=tmp_path)
    paths = [Path(line) for line in done.stdout.split()]
    assert done.returncode == 0 and len(paths) == 3 and all(path.is_file() for path in paths), done.stderr


@pytest.mark.slow
def test_a_job_ends_with_code_2_and_one_line(tmp_path: Path):
    done = job("reconstruct", "nowhere", "picture.png", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: nowhere is not a folder; give a run folder, such as runs/ddmi/furniture-image\n"


def test_jobs_refuse_bad_input_in_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG nothing")
    smooth_picture(0, 64).save(tmp_path / "good.png")
    cut = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[: len(cut) // 2])
    monkeypatch.chdir(tmp_path)
    before = sorted(run.rglob("*"))

    def refused(name: str, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "jobs" / f"{name}.py"), run_name="__main__")
        lines = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    assert "nowhere is not a folder" in refused("sample", "nowhere")
    assert "has no config.json" in refused("sample", tmp_path / "empty")
    assert f"did you mean {run}?" in refused("evaluate", run.parent)
    assert f"did you mean {run}?" in refused("evaluate", run / "prior")
    assert "--count" in refused("sample", run, "--count", "many")
    assert "count=0" in refused("sample", run, "--count", 0)
    assert "resolution=0" in refused("sample", run, "--resolution", 0)
    assert "resolution=99999" in refused("sample", run, "--resolution", 99999)
    assert "steps=0" in refused("sample", run, "--steps", 0)
    assert "steps=5000" in refused("sample", run, "--steps", 5000)
    assert "--colour" in refused("sample", run, "--colour", "red")
    assert "missing.png cannot be read" in refused("reconstruct", run, tmp_path / "good.png", "missing.png")
    assert "damaged.png is not a usable picture" in refused("reconstruct", run, tmp_path / "damaged.png")
    assert "cut.png is not a usable picture" in refused("reconstruct", run, tmp_path / "cut.png")
    assert "cannot be made" in refused("sample", run, "--out", tmp_path / "good.png")
    assert f"{tmp_path} exists; choose another folder" in refused("export", run, "--out", tmp_path)
    assert sorted(run.rglob("*")) == before


def test_the_bundled_run_is_its_preset_and_draws_furniture():
    folder = REPOSITORY / "examples" / "runs" / "furniture-image-long"
    files = [*folder.glob("*.*"), *folder.glob("*/model.safetensors")]
    assert len(files) == 9 and sum(path.stat().st_size for path in files) < 10e6
    model = dinr.load(folder)
    changed = differences(PRESETS["furniture-image-long"](), model.experiment)
    assert changed.keys() <= {"scale.launcher", "scale.num_threads"}

    samples = model.sample(8, seed=1, steps=20).render(64)
    ground, middle = samples[:, :, :4, :4].mean((1, 2, 3)), samples[:, :, 20:44, 20:44].mean((1, 2, 3))
    assert (ground > 0.9).float().mean() >= 0.75 and (middle < ground - 0.05).all()  # something stands on white
    assert torch.cdist(samples.flatten(1), samples.flatten(1)).add(torch.eye(8) * 99).min() > 5  # and each is another

    val = model.experiment.dataset(model.experiment.data.index(model.experiment.data.val))
    signal = collate([val.signal(number)[0] for number in range(0, len(val), 4)])
    assert psnr(model.encode(signal).render(64), (signal.inputs + 1) / 2).mean() > 24
