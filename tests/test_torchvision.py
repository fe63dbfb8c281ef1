"""Importing torchvision with and without its compiled operators."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

WITHOUT_OPERATORS = """
import torch
def fail(path):
    raise OSError("the operator library does not load")
torch.ops.load_library = fail
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_libraries_import_where_operators_do_not_load():
    program = f"""{WITHOUT_OPERATORS}
try:
    import torchvision
    raise SystemExit("the plain import works: nothing is tested")
except RuntimeError as error:
    assert "torchvision::nms" in str(error), error
from distributed_inr.models.torchvision_cpu import import_torchvision
import_torchvision()
import_torchvision()
import torchvision, diffusers, timm, open_clip, torchmetrics.functional.image, torch_fidelity
print(torchvision.transforms.Resize(4)(torch.zeros(3, 8, 8)).shape[-1])
"""
    assert run(program) == "4"


@pytest.mark.slow
def test_an_importable_torchvision_is_left_alone():
    program = """
import sys, torch
from distributed_inr.models import torchvision_cpu
try:
    import torchvision
except RuntimeError:  # make the operators exist, as beside the torch that this torchvision was built for
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in torchvision_cpu._SCHEMAS:
        library.define(schema)
    import torchvision
before = dict(vars(torchvision))
torchvision_cpu.import_torchvision()
assert sys.modules["torchvision"] is torchvision and dict(vars(torchvision)) == before
print(torchvision_cpu._LIBRARIES)
"""
    assert run(program) == "[]"


def test_other_failures_of_the_import_are_not_hidden(monkeypatch: pytest.MonkeyPatch):
    from distributed_inr.models import torchvision_cpu

    def fail(name: str) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(torchvision_cpu.importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        torchvision_cpu.import_torchvision()
