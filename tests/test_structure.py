"""The layout: imports point one way, and the models need no distributed library."""

import ast
from pathlib import Path

PACKAGE = Path("distributed_inr")
ORDER = (
    "config",
    "randomness",
    "field",
    "raw",
    "domains",
    "models",
    "data",
    "training",
    "experiment",
    "presets",
    "sheets",
    "generation",
    "files",
    "evaluation",
    "analysis",
    "console",
    "allocator",
    "worker",
    "launch",
    "run_folder",
    "latents",
    "texts",
    "pipeline",
    "needs",
    "plan",
    "sweeps",
)
DISTRIBUTED = {"ray", "deepspeed", "accelerate", "webdataset", "torch.distributed"}


def imports(file: Path) -> list[str]:
    """Absolute names that a module imports at any depth, but those for annotations alone."""
    tree, names = ast.parse(file.read_text()), []
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def modules() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


def level(dotted: str) -> int:
    return ORDER.index(dotted.split(".")[1])


def test_every_module_has_a_place_in_the_order():
    assert {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in modules()} <= set(ORDER)


def test_imports_point_one_way():
    wrong = [
        f"{file} imports {name}"
        for file in modules()
        for name in imports(file)
        if name.startswith("distributed_inr.")
        and level(name) > level(".".join(("distributed_inr", *file.relative_to(PACKAGE).with_suffix("").parts)))
    ]
    assert not wrong


def test_domains_and_models_import_no_distributed_library():
    wrong = [
        f"{file} imports {name}"
        for folder in ("domains", "models")
        for file in sorted((PACKAGE / folder).glob("*.py"))
        for name in imports(file)
        if any(name == library or name.startswith(library + ".") for library in DISTRIBUTED)
    ]
    assert not wrong


def test_only_the_launcher_and_its_workers_import_ray():
    wrong = [
        str(f)
        for f in modules()
        if f.stem not in ("worker", "launch", "sweep") and any(n.split(".")[0] == "ray" for n in imports(f))
    ]
    assert not wrong
