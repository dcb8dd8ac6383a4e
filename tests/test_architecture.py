"""Imports point one way, nothing imports a script, and the maths knows no files or processes."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# What each room may import. A new room has to be put here.
ARROWS = {
    "cpu": "",
    "parts": "",
    "conditions": "",
    "layouts": "",
    "moe_kernels": "cpu",
    "routers": "parts",
    "moe": "moe_kernels parts routers",
    "models": "conditions cpu layouts moe parts routers",
    "diffusion": "parts",
    "runtime": "parts",
}
for room in ("latents", "checkpoints", "sampling", "evaluation", "training", "engines"):
    ARROWS[room] = " ".join(ARROWS)  # all those before it
ARROWS["analysis"] = ARROWS["evaluation"]
for room in ("benchmarks", "experiments"):
    ARROWS[room] = " ".join(ARROWS)
PURE = ("models", "conditions", "moe", "layouts", "parts", "routers", "moe_kernels", "diffusion")
FORBIDDEN = ("argparse", "torch.distributed", "pathlib", "os", "io", "shutil", "tempfile")


def files_of(room: str) -> list[Path]:
    return sorted(ROOT.glob(f"{room}/**/*.py")) or [ROOT / f"{room}.py"]


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports anywhere, functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def scripts() -> set[str]:
    return {path.stem for path in ROOT.glob("*.py")} - ARROWS.keys()


def test_every_folder_and_module_is_a_room_or_a_script():
    """A module at the root that is no script ends without a `main`."""
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders - {"tests", "scripts"} == {
        room for room in ARROWS if [*ROOT.glob(f"{room}/*.py")]
    }
    for name in scripts():
        assert "__main__" in (ROOT / f"{name}.py").read_text(), f"{name}.py is no room of ARROWS"


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_only_those_below_it(room):
    ours = ARROWS.keys() | scripts() | {"tests", "conftest"}
    for path in files_of(room):
        imported = {name.split(".")[0] for name in imports_of(path)} & ours
        assert imported <= {room, *ARROWS[room].split()}, path


def test_nothing_imports_a_script():
    folders = (".", "scripts", "benchmarks", "experiments")
    others = [path for folder in folders for path in ROOT.glob(f"{folder}/*.py")]
    for path in others:
        assert not {name.split(".")[0] for name in imports_of(path)} & scripts(), path


@pytest.mark.parametrize("room", PURE)
def test_models_and_maths_know_no_flags_processes_or_files(room):
    for path in files_of(room):
        imported = imports_of(path)
        assert not [n for n in imported for word in FORBIDDEN if f"{n}.".startswith(f"{word}.")], (
            path
        )
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [f for f in calls if isinstance(f, ast.Name) and f.id == "open"], path
