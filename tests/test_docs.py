"""The documentation: its Python code and the notebook run, and its commands are valid."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from string import Template

import pytest
import torch
from helpers import ROOT, call_main, command_line
from PIL import Image

from checkpoints import load_model
from runtime import __version__
from training.run_folder import CONFIG_FILE

CLASSES = ("ankle-boot", "bag", "sneaker")
SHORTER = {  # settings of the examples that train
    "max_steps=1000": "max_steps=2, depth=2, num_sample=0, num_workers=0, precision='fp32'",
    "global_batch_size=64": "global_batch_size=8",
    "cfg_scale=2.5))": "cfg_scale=2.5, num_sampling_steps=5))",
    "names[-1]))": "names[-1], num_sampling_steps=5))",
    "num_inference_steps=20": "num_inference_steps=2",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, image_tree, train_flags):
    """Folder with the files that the documentation names: data, the autoencoder and a run."""
    root = tmp_path_factory.mktemp("workspace")
    for label, name in enumerate(CLASSES):
        shutil.copytree(image_tree / f"class-{label}", root / "data" / "fashion-mnist" / name)
    for name in ("assets", "config"):
        (root / name).symlink_to(ROOT / name)
    values = {
        "data-path": root / "data" / "fashion-mnist", "image-size": 32, "run-name": "demo",
        "vae-path": ROOT / "assets" / "vae-fashion-mnist", "global-batch-size": 8,
        "max-steps": 2, "ema": "exponential:decay=0.997", "rf": True,
    }  # fmt: skip
    call_main("train.py", *train_flags(root / "results", **values))
    exported = ("--format", "pipeline", "--samples", 0, "--output", root / "results" / "pipeline")
    call_main("export.py", "--ckpt", root / "results" / "demo", *exported)
    return root


def test_python_examples_in_the_docs_run_and_have_at_most_ten_lines(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    for page in ("README.md", "docs/python.md"):
        values: dict = {}
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        assert blocks
        for code in blocks:
            if code.startswith("from pathlib import Path\n\nimport torch") or "ROUTERS" in code:
                continue  # the training loops and the router, which other tests run
            assert len(code.splitlines()) <= 10, code
            for long, short in SHORTER.items():
                code = code.replace(long, short)
            exec(compile(code, page, "exec"), values)
    pipeline, generator = values["pipeline"], torch.Generator().manual_seed(0)
    assert (pipeline.images([2], [0]).int() - values["images"][:1]).abs().max() <= 1  # sneaker
    # The last digit depends on the memory alignment of tensors.
    assert (pipeline.images([1] * 4, generator).int() - values["first"]).abs().max() <= 1
    assert not torch.equal(values["first"], values["second"])
    assert values["counts"].by_class.shape == (2, 2, 4)
    assert (values["counts"].by_class.sum(-1) == 4 * 5 * 16 * 2).all()  # images, steps, patches, K
    assert values["experts"].shape == (2, 1, 16) and values["experts"].min() >= 0
    assert (workspace / "results" / "from-python" / "checkpoints" / "0000002").is_dir()
    assert {path.name for path in workspace.iterdir()} == {"assets", "config", "data", "results"}


def test_the_documented_training_loop_saves_a_model_that_sample_py_opens(monkeypatch, tmp_path):
    text = (ROOT / "docs" / "python.md").read_text()
    (code,) = re.findall(r"## Your own loop\n.*?```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 50
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    values: dict = {}
    exec(compile(code, "docs/python.md", "exec"), values)
    drawn = ("--num-sampling-steps", 2, "--class-labels", "dog", "--output", "dog.png")
    call_main("sample.py", "--ckpt", "results/my-dit.safetensors", *drawn)
    loaded = load_model("results/my-dit.safetensors")
    for name, weight in values["model"].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.cpu()), name
    biases = [b.moe.gate.e_score_correction_bias for b in loaded.blocks]
    assert all(bias.any() for bias in biases)  # the routers were updated
    assert (tmp_path / "dog.png").is_file()


def test_the_documented_fine_tuning_adapts_a_model_that_sample_py_opens(monkeypatch, tmp_path):
    pytest.importorskip("peft")
    text = (ROOT / "docs" / "python.md").read_text()
    (code,) = re.findall(r"## Fine-tune with peft\n.*?```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "results").mkdir()
    (tmp_path / "my-pictures" / "food-fruit").mkdir(parents=True)
    for number in range(2):
        image = Image.effect_noise((72, 64), 50 + number).convert("RGB")
        image.save(tmp_path / "my-pictures" / "food-fruit" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    values: dict = {}
    exec(compile(code.replace(", 100", ", 3"), "docs/python.md", "exec"), values)
    flags = ("--class-labels", "food-fruit", "--output", "fruit.png")
    call_main("sample.py", "--ckpt", "results/my-fruit.safetensors", *flags)
    assert (tmp_path / "fruit.png").is_file()
    old = load_model("assets/demo-emoji").state_dict()
    new = load_model("results/my-fruit.safetensors").state_dict()
    changed = {name for name, weight in old.items() if not torch.equal(new[name], weight)}
    assert old.keys() == new.keys() and changed
    parts = ("attn", "shared_experts", "adaLN_modulation", "embedder.mlp", "final_layer")
    assert {next((p for p in parts if p in name), name) for name in changed} == {*parts}


def shell_of(path: Path) -> list[str]:
    """Returns the shell code in a page (fenced or indented), in a docstring, or in comments."""
    text = path.read_text()
    fenced = []
    if path.suffix == ".md":
        fenced = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    elif path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = re.sub("^# ?", "", text, flags=re.MULTILINE)
    indented = r"^ {2,}(?:\w+=\".*\"$|(?:\w+=\S+ )?(?:python|torchrun) (?:.*\\\n)*.*)"
    return [*fenced, "\n".join(re.findall(indented, text, re.MULTILINE))]


def commands_of(blocks: list[str]) -> Iterator[list[str]]:
    """Yields [module, *arguments] for every command that runs our Python code.

    For a shell loop, only the first iteration is returned.
    """
    for block in blocks:
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").replace(" ...", "").splitlines():
            line = Template(line.strip()).safe_substitute(variables)
            if found := re.match(r'(\w+)="?([^"]*)"?$|for (\w+) in (\S+)', line):
                variables |= dict([[value for value in found.groups() if value is not None]])
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                if word.endswith(".py") or (words[place - 1] == "-m" and word != "pytest"):
                    yield [word.removesuffix(".py").replace("/", "."), *words[place + 1 :]]
                    break


def check(script: str, *arguments: str) -> None:
    with command_line(script, arguments) as module:
        module.parse_args()  # raises UserError for an unknown flag or a wrong value


@pytest.mark.parametrize("pattern, count", [
    ("README.md", 15), ("docs/*.md", 150), ("assets/*/README.md", 20),
    ("config/recipes/*.yaml", 90), ("*.py", 30), ("tools/**/*.py", 20),
    ("experiments/*.py", 6),
])  # fmt: skip
def test_the_commands_in_docs_recipes_and_docstrings_are_valid(pattern, count, monkeypatch):
    """test_router_runs.py runs the commands of docs/architecture.md, which define a router."""
    monkeypatch.chdir(ROOT)
    pages = {*ROOT.glob(pattern)} - {ROOT / "docs" / "architecture.md"}
    commands = [command for page in sorted(pages) for command in commands_of(shell_of(page))]
    assert len(commands) >= count
    for command in commands:
        if "--plugin" not in command:  # test_router_runs.py runs them
            check(*command)


def test_the_demo_asks_pytorch_for_the_precision(demo_script, capsys):
    (code,) = re.findall(r'python -c "\n(.*?)"\)', demo_script.read_text(), re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out in ("fp32\n", "bf16\n")


def python_commands(script: Path, folder: Path, *arguments: str, **environment: str):
    """Runs a shell script with a `python` that only records its arguments, and answers
    `python -c`, which asks for a precision, with fp32.

    Returns the recorded arguments and the finished process.
    """
    record, python = folder / "commands.jsonl", folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    record.write_text("")
    # One write: the demo runs some commands at the same time.
    write = "import json, sys; sys.stdout.write(json.dumps(sys.argv[1:]) + chr(10))"
    python.write_text(
        f'#!/bin/bash\n[ "$1" = -c ] && exec echo fp32\n'
        f"exec {sys.executable} -S -c '{write}' \"$@\" >> {record}\n"
    )
    python.chmod(0o755)
    path = {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    path["PYTHON"] = str(python)
    ended = subprocess.run(
        ["bash", script, *arguments], cwd=folder, text=True, capture_output=True,
        env={**os.environ, **path, **environment},
    )  # fmt: skip
    return [json.loads(line) for line in record.read_text().splitlines()], ended


@pytest.fixture
def demo_script(tmp_path) -> Path:
    """scripts/demo.sh beside a setup.sh that installs nothing."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup.sh").touch()
    return Path(shutil.copy(ROOT / "scripts" / "demo.sh", tmp_path / "scripts"))


@pytest.mark.parametrize("name", ["fashion", "emoji"])
def test_the_commands_of_the_demo_are_valid(name, demo_script, tmp_path, monkeypatch):
    commands, ended = python_commands(demo_script, tmp_path, name)
    assert not ended.returncode, ended.stderr
    monkeypatch.chdir(ROOT)
    tried = [*commands_of([ended.stdout.partition("Try next:")[2]])]
    assert len(commands) >= 8 and len(tried) == 3
    for words in [*commands, *tried]:
        check(*words[1:] if words[0] == "-m" else words)


def test_a_short_demo_samples_little_and_makes_only_what_is_older_than_its_checkpoint(
    demo_script, tmp_path
):
    run = partial(python_commands, demo_script, tmp_path)
    whole, _ = run()
    short, _ = run(DEMO_STEPS="20")
    assert "cache_latents.py" in str(whole) and "cache_latents.py" not in str(short)
    short.insert(1, whole[1])
    for words, fewer in zip(whole, short, strict=True):
        for flag in {"--max-steps", "--num-sampling-steps", "--images-per-class"} & {*words}:
            assert int(fewer[fewer.index(flag) + 1]) < int(words[words.index(flag) + 1])
    assert (
        "--max-steps" in str(short) and short[4][short[4].index("--num-sampling-steps") + 1] == "5"
    )
    out = tmp_path / "results" / "demo"
    checkpoint = out / "checkpoints" / "0000020"
    checkpoint.mkdir(parents=True)
    made = ("samples.png", "three.png", "expert_data.npz", "heatmap_class.png", "run.png",
            "heatmap_timestep.png", "expert_report.html")  # fmt: skip
    for name, time in {checkpoint: 1, "log.jsonl": 1, **dict.fromkeys(made, 3)}.items():
        (out / name).is_dir() or (out / name).touch()
        os.utime(out / name, (time, time))
    os.utime(out / "expert_data.npz", (2, 2))
    again, ended = run()
    assert [words[0] for words in again] == ["-m", "cache_latents.py", "train.py"], ended.stderr
    os.utime(checkpoint, (4, 4))  # trained further
    again, _ = run()
    assert [words[0] for words in again[3:]] == ["sample.py", "sample.py", "expert_data.py"]


def test_a_demo_of_an_earlier_version_is_one_line(demo_script, tmp_path):
    (tmp_path / "results" / "demo").mkdir(parents=True)
    (tmp_path / "results" / "demo" / CONFIG_FILE).write_text("model: {}\n---\nversion: 0.2.0\n")
    commands, ended = python_commands(demo_script, tmp_path)
    assert ended.returncode == 2 and not [words for words in commands if "train.py" in words]
    assert re.fullmatch(r"error: results/demo .* delete or rename it.*\n", ended.stderr)


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("scripts/train_*.sh")), ids=lambda path: path.stem
)
def test_the_recipes_of_clusters_are_valid_and_need_the_name_of_a_run(
    script, tmp_path, monkeypatch
):
    (command,), ended = python_commands(script, tmp_path, "--dry-run", RUN="a name")
    assert not ended.returncode and command[-2:] == ["--run-name", "a name"]
    monkeypatch.chdir(ROOT)
    check(*command)
    commands, ended = python_commands(script, tmp_path, RUN="")
    assert ended.returncode == 2 and not commands and re.fullmatch("RUN: .*\n", ended.stderr)


@pytest.fixture
def notebook_shell(monkeypatch, tmp_path):
    """IPython in the folder of the notebook, and the list of what its cells show."""
    pytest.importorskip("ipykernel")
    import matplotlib
    from IPython.core.displayhook import DisplayHook
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shown, backend = [], matplotlib.get_backend()
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(DisplayHook, "write_format_data", lambda _, data, *__: shown.append(data))
    monkeypatch.setattr(DisplayPublisher, "publish", lambda _, data, **__: shown.append(data))
    monkeypatch.setattr(InteractiveShell, "enable_gui", lambda *_: None)  # of terminals
    no_history = Config(HistoryManager={"enabled": False})
    shell = InteractiveShell.instance(ipython_dir=str(tmp_path), config=no_history)
    yield shell, shown
    InteractiveShell.clear_instance()
    shell.restore_sys_module_state()
    matplotlib.use(backend)


def test_the_demo_notebook_runs(workspace, notebook_shell):
    nbformat, (shell, shown) = pytest.importorskip("nbformat"), notebook_shell
    book = nbformat.read(ROOT / "docs" / "demo.ipynb", as_version=4)
    text = (ROOT / "docs" / "demo.ipynb").read_text()
    words = re.sub(r'"image/\w+": ".*"', "", text)
    saved = [out.get("data", {}) for cell in book.cells for out in cell.get("outputs", ())]
    assert sum("image/png" in data or "image/jpeg" in data for data in saved) == 4
    assert len(text) < 500_000 and not re.search("/home|/root|/tmp|/work|stderr", words)
    first, *others = [cell for cell in book.cells if cell.cell_type == "code"]
    assert first.metadata.tags == ["parameters"]
    first.source = f"CKPT, CLASSES = {str(workspace / 'results' / 'demo')!r}, [0, 1]"
    for cell in (first, *others):
        source = cell.source.replace("num_sampling_steps=20", "num_sampling_steps=4")
        shell.run_cell(source).raise_error()
    assert Path(sys.path[0]).resolve() == ROOT  # for a kernel, which starts in docs/
    assert sum("image/png" in data for data in shown) == 4


def test_citation_changelog_and_run_config_have_the_same_version(workspace):
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert (
        f"\nversion: {__version__}\n" in (workspace / "results" / "demo" / CONFIG_FILE).read_text()
    )
