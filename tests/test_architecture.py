"""The allowed imports: modules depend on lower layers only, and the maths uses no files."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

LEAF = "checkpoints.layouts"  # `DiT.load_state_dict` imports it, and it imports nothing of ours
# The modules that each top-level module or package may import. Add new modules here.
ALLOWED_IMPORTS = {
    "options": "",
    "conditions": "options",
    "presets": "",
    "moe_kernels": "",
    "routers": "options",
    "moe": "moe_kernels options routers",
    "initialization": "routers",
    "models": "conditions initialization moe moe_kernels options presets routers",
    "wrappers": "models moe_kernels routers",
    "diffusion": "options",
    "runtime": "options",
}
for module in ("latents", "checkpoints", "sampling", "evaluation", "training"):
    ALLOWED_IMPORTS[module] = " ".join(ALLOWED_IMPORTS)  # all modules listed before this one
ALLOWED_IMPORTS["analysis"] = ALLOWED_IMPORTS["evaluation"]
CORE = (*ALLOWED_IMPORTS,)  # which imports nothing of the following
ALLOWED_IMPORTS["extras"] = " ".join(CORE)
ALLOWED_IMPORTS["tools"] = ALLOWED_IMPORTS["experiments"] = " ".join((*CORE, "extras", "tools"))
for module in ("extras", "experiments", "tools"):  # the core does without them
    if not (ROOT / module).exists():
        del ALLOWED_IMPORTS[module]
PURE = (
    "models", "presets", "initialization", "wrappers", "conditions", "moe",
    "options", "routers", "moe_kernels", "diffusion",
)  # fmt: skip
FORBIDDEN = ("argparse", "torch.distributed", "pathlib", "os", "io", "shutil", "tempfile")


def files_of(module: str) -> list[Path]:
    paths = [path for path in ROOT.glob(f"{module}/**/*.py") if path.parent.name != "tests"]
    return sorted(paths) or [ROOT / f"{module}.py"]


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, at the top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def scripts() -> set[str]:
    return {path.stem for path in ROOT.glob("*.py")} - {*ALLOWED_IMPORTS, "conftest"}


def test_every_folder_and_module_is_in_the_import_table_or_is_a_script():
    """A Python file in the root folder that is missing from the table must be a script."""
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders - {"tests"} == {
        module for module in ALLOWED_IMPORTS if [*ROOT.glob(f"{module}/*.py")]
    }
    for name in scripts():
        assert "__main__" in (ROOT / f"{name}.py").read_text(), (
            f"{name}.py is not in ALLOWED_IMPORTS"
        )


@pytest.mark.parametrize("module", ALLOWED_IMPORTS)
def test_a_module_imports_only_modules_that_the_table_allows(module):
    ours = ALLOWED_IMPORTS.keys() | scripts() | {"tests", "helpers"}
    for path in files_of(module):
        names = {name for name in imports_of(path) if module != "models" or LEAF not in name}
        imported = {name.split(".")[0] for name in names} & ours
        assert imported <= {module, *ALLOWED_IMPORTS[module].split()}, path


def test_the_layouts_that_a_model_loads_import_nothing_of_ours():
    imported = imports_of(ROOT / f"{LEAF.replace('.', '/')}.py")
    assert not {name.split(".")[0] for name in imported} & ALLOWED_IMPORTS.keys()


def test_no_module_or_script_imports_a_script():
    others = [path for module in ALLOWED_IMPORTS.keys() - {*CORE} for path in files_of(module)]
    for path in [*ROOT.glob("*.py"), *others]:
        assert not {name.split(".")[0] for name in imports_of(path)} & scripts(), path


def test_training_knows_engines_only_by_their_protocol():
    """`engine_for` chooses one."""
    chosen = {"training.engines", "training.engines.engine_for"}
    for path in ROOT.glob("training/*.py"):
        names = imports_of(path) - chosen
        assert not [name for name in names if name.startswith("training.engines")], path


def test_no_files_import_each_other_in_a_circle():
    """At the top or inside functions; a package counts as its __init__.py."""
    paths = [path for module in ALLOWED_IMPORTS for path in files_of(module)]
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    waiting = {name: imports_of(path) & modules.keys() - {name} for name, path in modules.items()}
    for name, names in waiting.items():  # `from a.b import c` also names the package a.b
        waiting[name] = {n for n in names if not any(one.startswith(f"{n}.") for one in names)}
    while free := {name for name, names in waiting.items() if not names & waiting.keys()}:
        waiting = {name: names for name, names in waiting.items() if name not in free}
    assert not waiting


@pytest.mark.parametrize("module", PURE)
def test_models_and_maths_use_no_flags_processes_or_files(module):
    for path in files_of(module):
        imported = imports_of(path)
        assert not [n for n in imported for word in FORBIDDEN if f"{n}.".startswith(f"{word}.")], (
            path
        )
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [f for f in calls if isinstance(f, ast.Name) and f.id == "open"], path
