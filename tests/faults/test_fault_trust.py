"""Files and addresses from strangers: nothing of theirs is run, every lie is refused in one line; secrets stay ours."""

import builtins
import hashlib
import io
import json
import os
import pickle
import posix
import runpy
import secrets
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_sets import png, records

import distributed_inr as dinr
from distributed_inr.config import override
from distributed_inr.data import prepare
from distributed_inr.data.cache import Cache
from distributed_inr.data.reader import ShardDataset, read_latent
from distributed_inr.data.shard_writer import ShardWriter
from distributed_inr.data.shards import load_index
from distributed_inr.domains import Image
from distributed_inr.evaluation import metrics
from distributed_inr.experiment import Experiment
from distributed_inr.generation import load_weights, read_experiment
from distributed_inr.launch import Worker
from distributed_inr.models.perceptual import lpips
from distributed_inr.pipeline import fit_latent_prior
from distributed_inr.run_folder import Stage
from distributed_inr.training import checkpoint

JOBS = Path(__file__).parents[2] / "jobs"


@dataclass(frozen=True)
class Made:
    """A complete tiny run that a process made, what it printed, and the secrets in its environment."""

    folder: Path
    output: bytes
    secrets: dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    names = ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "HF_TOKEN", "WANDB_API_KEY")
    hidden = {name: secrets.token_hex(20) for name in names}
    program = f"from {__name__} import make_run; make_run({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | hidden | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout.decode()
    return Made(folder / "runs" / "ddmi" / "tiny", done.stdout, hidden)


def make_run(folder: str) -> None:
    """In a process of its own: every stage of a run, logging as a job does."""
    from test_pipeline import FAST
    from tiny_run import tiny_experiment, write_pictures

    from distributed_inr import pipeline
    from distributed_inr.config import command

    write_pictures(Path(folder) / "train", 9, seed=1)
    write_pictures(Path(folder) / "val", 3, seed=2)
    command(lambda: print(pipeline.run(override(tiny_experiment(Path(folder)), FAST))))()


@pytest.fixture
def run(made: Made, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(made.folder, tmp_path / "run"))


def refusal(action: Callable[[], Any]) -> str:
    """The one line that an action is refused with."""
    with pytest.raises(ValueError) as refused:
        action()
    line = str(refused.value)
    assert line and "\n" not in line and len(line) < 1000, line
    return line


# 57: pickles


class Call:
    """Pickled, it is a call that unpickling makes."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def payloads(marker: Path) -> dict[str, bytes]:
    """Files that make `marker` when they are unpickled."""
    touch = f"touch {marker}"
    zipped, legacy, npy, npz = (io.BytesIO() for _ in range(4))
    torch.save({"weight": Call(os.mkdir, str(marker))}, zipped)
    torch.save({"weight": Call(os.mkdir, str(marker))}, legacy, _use_new_zipfile_serialization=False)
    objects = np.array([Call(os.mkdir, str(marker))], dtype=object)
    np.save(npy, objects)
    np.savez(npz, latent=objects)
    exported = io.BytesIO(zipped.getvalue())
    with zipfile.ZipFile(exported, "a") as archive:
        archive.writestr("archive/archive_format", "pt2")
    return {
        "os.system, protocol 0": b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        "builtins.exec, protocol 1": pickle.dumps(Call(builtins.exec, f"open({str(marker)!r}, 'w').close()"), 1),
        "posix.system, protocol 2": pickle.dumps(Call(posix.system, touch), 2),
        "subprocess.call, protocol 3": pickle.dumps(Call(subprocess.call, ["touch", str(marker)]), 3),
        "builtins.eval, protocol 4": pickle.dumps(Call(eval, f"__import__('os').mkdir({str(marker)!r})"), 4),
        "os.mkdir, protocol 5": pickle.dumps(Call(os.mkdir, str(marker)), 5),
        "torch zip": zipped.getvalue(),
        "torch legacy": legacy.getvalue(),
        "pt2": exported.getvalue(),
        "npy": npy.getvalue(),
        "npz": npz.getvalue(),
    }


def is_live(content: bytes, marker: Path) -> bool:
    """Whether careless loaders would run it; they do."""
    careless = (
        lambda: torch.load(io.BytesIO(content), weights_only=False),
        lambda: dict(np.load(io.BytesIO(content), allow_pickle=True)),
        lambda: pickle.loads(content),
    )
    for load in careless:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load()
            except Exception as error:
                del error
        if marker.exists():
            (marker.rmdir if marker.is_dir() else marker.unlink)()
            return True
    return False


PAYLOADS = list(payloads(Path("/nonexistent")))


@pytest.mark.parametrize("name", PAYLOADS)
def test_fault_57_pickles_in_the_place_of_weights_configs_and_checkpoints_never_run(
    run: Path, tmp_path: Path, name: str
) -> None:
    """malicious pickle as weights, checkpoint, config or statistics: never executed, refused in one line."""
    marker = tmp_path / "owned"
    content = payloads(marker)[name]
    assert is_live(content, marker)
    experiment = read_experiment(run)

    for file in ("autoencoder/model.safetensors", "prior/model.safetensors", "config.json"):
        kept = (run / file).read_bytes()
        (run / file).write_bytes(content)
        assert str(run / file) in refusal(lambda: dinr.load(run))
        (run / file).write_bytes(kept)

    foreign = tmp_path / "weights.pth"
    foreign.write_bytes(content)
    picture = torch.zeros(1, 3, 64, 64)
    assert str(foreign) in refusal(lambda: lpips(picture, picture, network="squeeze", weights=str(foreign)))
    assert str(foreign) in refusal(lambda: metrics.Inception(foreign))

    (run / "latents" / "statistics.json").write_bytes(content)
    worker = Worker(0, 1, lambda metrics: None, lambda *progress: None, lambda: False)
    stage = Stage(run / "prior", {})
    refusal(lambda: fit_latent_prior(worker, experiment=experiment, stage=stage, latents=run / "latents"))

    checkpoints = run / "autoencoder" / "checkpoints"
    [newest] = checkpoints.iterdir()
    for file in sorted(path.name for path in newest.iterdir()):
        kept = {path: path.read_bytes() for path in newest.iterdir()}
        put_into_checkpoint(newest / file, content)
        if file != "config.json":  # a copy for people: resuming does not read it
            refusal(lambda: checkpoint.read_state(newest_of(checkpoints)))
        for path, before in kept.items():
            path.write_bytes(before)
    assert newest_of(checkpoints) == str(newest)
    assert not marker.exists()


def newest_of(checkpoints: Path) -> str:
    found = checkpoint.newest(str(checkpoints))
    assert found is not None
    return found


def put_into_checkpoint(path: Path, content: bytes) -> None:
    """Replace a file of a checkpoint, and what the manifest says of it: its sums guard against accidents alone."""
    path.write_bytes(content)
    if path.name != "manifest.json":
        files = json.loads((path.parent / "manifest.json").read_text())["files"]
        files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        checkpoint.commit(str(path.parent), [files])


@pytest.mark.parametrize("name", PAYLOADS)
def test_fault_57_pickles_in_shards_and_their_indexes_never_run(tmp_path: Path, name: str) -> None:
    """malicious pickle as a member of a shard, side index or index.json: never executed, a bad sample or one line."""
    marker = tmp_path / "owned"
    content = payloads(marker)[name]
    assert is_live(content, marker)
    folder, cache = tmp_path / "set", Cache(str(tmp_path / "cache"), gib=1.0)
    members = ("png", "txt", "json", "latent.npy", "pyd", "pkl", "pth", "pickle", "npz", "cls", "ten")
    writer = ShardWriter(folder, domain="image", protocol={})
    writer.write({"__key__": "a"} | dict.fromkeys(members, content))
    writer.write({"__key__": "b", "png": png(1, 32), "json": content})
    writer.write({"__key__": "c", "png": png(2, 32), "txt": content})
    index = writer.close()

    assert [record["pkl"] for record in records(index, cache) if "pkl" in record] == [content]
    read = Image(size=16, source_size=32).read
    dataset = ShardDataset(index, read=read, seed=0, max_bad_fraction=1.0, cache=cache)
    assert [dataset[0].key, dataset[1].key] == ["b", "b"] and dataset.num_bad == 1
    latents = ShardDataset(index, read=read_latent, seed=0, max_bad_fraction=1.0, cache=cache)
    assert "none of its 3 samples is good" in refusal(lambda: latents[0])
    assert prepare.verify(str(folder), cache=cache) == []
    assert prepare.describe(str(folder), cache=cache)["samples"] == 3

    (folder / "000000.tar.idx").write_bytes(content)
    assert len(records(load_index(str(folder), cache=cache), cache)) == 3
    (folder / "index.json").write_bytes(content)
    assert "index.json cannot be read" in refusal(lambda: load_index(str(folder), cache=cache))
    assert not marker.exists()


# 60: configs


def changed(path: str, value: object) -> Callable[[dict], str]:
    def change(tree: dict) -> str:
        node = tree
        *parents, last = path.split("/")
        for parent in parents:
            node = node[parent]
        node[last] = value
        return json.dumps(tree)

    return change


CONFIGS: dict[str, tuple[Callable[[dict], str], str]] = {
    "YAML object": (lambda tree: "!!python/object/apply:os.system ['touch owned']", "not JSON.*config.json"),
    "YAML object in a field": (lambda tree: "name: !!python/name:os.system ''\nseed: 0", "not JSON"),
    "YAML in JSON": (changed("seed", "!!python/object/apply:os.system ['touch owned']"), "seed=.!!python"),
    "hydra target": (changed("_target_", "os.system"), "_target_ is not a field; remove it"),
    "hydra target of a part": (changed("autoencoder/_target_", "os.system"), r"autoencoder\._target_ is not a field"),
    "hydra target for a part": (changed("prior/denoiser", {"_target_": "os.system"}), r"prior\.denoiser="),
    "jsonpickle": (changed("domain", {"py/object": "os.system"}), r"domain\.py/object is not a field|domain="),
    "kind that is a class": (changed("autoencoder/kind", "os.system"), r"autoencoder\.kind='os.system'.*'d2c-vae'"),
    "kind of a union": (
        changed("prior/denoiser/kind", "builtins.exec"),
        r"prior\.denoiser\.kind='builtins.exec'.*'unet'",
    ),
    "unknown field": (changed("scale/hook", "import os"), r"scale\.hook is not a field"),
    "method": (changed("domain/read", "os.system"), r"domain\.read is not a field"),
    "dunder": (changed("domain/__class__", "os.system"), r"domain\.__class__ is not a field"),
    "key of two lines": (changed("a\nerror: b", 1), r"a\\nerror: b is not a field"),
    "value of a megabyte": (changed("seed", "x" * 10**6), r"seed='x+\.\.\.x+': Input should be a valid integer"),
    "deep nesting": (lambda tree: "[" * 10**6, "not JSON.*recursion"),
    "number of a million digits": (lambda tree: '{"seed": ' + "1" * 10**6 + "}", "not JSON"),
    "no object": (lambda tree: "[]", r"the config=\[\]"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_fault_60_configs_that_name_code_are_refused(made: Made, tmp_path: Path, name: str) -> None:
    """config with python objects, hydra targets, class paths or unknown keys: refused in one line, never imported."""
    make, words = CONFIGS[name]
    (tmp_path / "config.json").write_text(make(json.loads((made.folder / "config.json").read_text())))
    line = refusal(lambda: dinr.load(tmp_path))
    assert line.startswith(f"{tmp_path}/config.json: ")
    assert pytest.raises(ValueError, match=words).matches(ValueError(line)), line
    assert os.listdir(tmp_path) == ["config.json"] and not Path("owned").exists()


def test_fault_60_a_job_refuses_such_a_config_with_code_2(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """config with a hydra target given to a job: exit code 2 and one line."""
    text = changed("prior/_target_", "os.system")(json.loads((made.folder / "config.json").read_text()))
    (tmp_path / "config.json").write_text(text)
    monkeypatch.setattr("sys.argv", ["sample.py", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(JOBS / "sample.py"), run_name="__main__")
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ") and "prior._target_ is not a field" in line


# 61: commands


def test_fault_61_a_run_folder_cannot_allow_its_own_commands(run: Path, tmp_path: Path) -> None:
    """run folder from a stranger whose config.json lets its data addresses run commands: evaluating it is refused."""
    changes = {"data.allow_pipe": True, "data.train": f"pipe:touch {tmp_path}/owned"}
    experiment: Experiment = override(read_experiment(run), changes)
    (run / "config.json").write_text(dinr.config.to_json(experiment))
    assert "give --allow-pipe if you trust them" in refusal(lambda: dinr.evaluate(run))
    assert not (tmp_path / "owned").exists()


# 62: safetensors


def lies(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Versions of a safetensors file whose header does not tell the truth."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    first, second = sorted(names, key=lambda name: header[name]["data_offsets"])[:2]
    start, end = header[first]["data_offsets"]

    def having(name: str = first, **changes: object) -> bytes:
        text = json.dumps(header | {name: header[name] | changes}).encode()
        return struct.pack("<Q", len(text)) + text + body

    raw = content[8 : 8 + length]
    yield "header of 2^63 bytes", struct.pack("<Q", 2**63) + content[8:]
    yield "header of 200 MB", struct.pack("<Q", 200_000_000) + content[8:]
    yield "header beyond the file", struct.pack("<Q", len(content)) + content[8:]
    yield "offsets beyond the file", having(data_offsets=[start, end + 2**40])
    yield "offsets of 2^63", having(data_offsets=[2**63, 2**63 + end - start])
    yield "shape of 2^63", having(shape=[2**63 - 1])
    yield "shape that overflows", having(shape=[2**32, 2**32])
    yield "negative shape", having(shape=[-1])
    yield "reversed offsets", having(data_offsets=[end, start])
    yield "overlapping offsets", having(second, data_offsets=[start, end], shape=header[first]["shape"])
    yield "dtype of another size", having(dtype="F64")
    yield "unknown dtype", having(dtype="object")
    low, high = header[second]["data_offsets"]
    yield "hole between", having(second, data_offsets=[low + 64, high + 64])
    yield "hole at the end", content + bytes(64)
    yield "cut", content[:-4]
    yield "invalid UTF-8", struct.pack("<Q", length) + raw.replace(b'"dtype"', b'"\xff\xfeype"', 1) + body
    doubled = raw.rstrip().removesuffix(b"}") + b", " + json.dumps({first: header[second]}).encode()[1:]
    yield "one name twice", struct.pack("<Q", len(doubled)) + doubled + body
    yield "deep nesting", struct.pack("<Q", 10**5) + b"[" * 10**5 + body


def test_fault_62_safetensors_with_lying_headers_are_refused(run: Path) -> None:
    """safetensors whose header lies about lengths, offsets, types or names: every loader refuses it in one line."""
    weights = run / "autoencoder" / "model.safetensors"
    good = weights.read_bytes()
    for name, content in lies(good):
        weights.write_bytes(content)
        for action in (lambda: dinr.load(run), lambda: load_weights(torch.nn.Linear(1, 1), weights)):
            assert str(weights) in refusal(action), name

    checkpoints = run / "autoencoder" / "checkpoints"
    [newest] = checkpoints.iterdir()
    for path in sorted(newest.glob("*.safetensors")):
        good = path.read_bytes()
        for name, content in lies(good):
            put_into_checkpoint(path, content)
            assert "is damaged" in refusal(lambda: newest_of(checkpoints)), name
        put_into_checkpoint(path, good)
    assert newest_of(checkpoints) == str(newest)


# 64: secrets


def test_fault_64_secrets_of_the_environment_are_never_written(made: Made) -> None:
    """secrets in the environment of a run: in no file below its folder and in nothing that it prints."""
    written = {str(path): path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    assert len(written) > 20 and b"samples done" in made.output
    for name, secret in made.secrets.items():
        hits = [where for where, content in (written | {"output": made.output}).items() if secret.encode() in content]
        assert not hits, (name, hits)
