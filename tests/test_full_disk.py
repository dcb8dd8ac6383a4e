"""A full disk gives every script a one-line error and leaves no incomplete files."""

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
from conftest import ROOT, call_main, command_line
from PIL import Image
from test_plot_run import row, write_log
from test_runs import file_size_limit
from test_sampling import checkpoints  # noqa: F401  # a fixture

from runtime.errors import run_main

SAMPLING = ["--num-sampling-steps", 1, "--batch-size", 4, "--ckpt", "MODEL"]
IMAGES = ["--data-path", "IMAGES", "--image-size", 16]
COMMANDS = [
    ["sample.py", *SAMPLING, "--output", "disk/new.png"],
    ["sample.py", *SAMPLING, "--output", "new.png", "--output-dir", "disk/new"],
    ["sample.py", *SAMPLING, "--output", "new.png", "--trajectory", "disk/new.png"],
    ["sample.py", *SAMPLING, "--output", "new.png", "--experts", "disk/new.gif"],
    ["evaluate.py", *SAMPLING, "--output", "disk/new", "--num-images", 12, "--backbone",
     "efficientnet-lite0"],
    ["heatmap_class.py", "--data", "counts.npz", "--output", "disk/new.png"],
    ["plot_run.py", "run", "--output", "disk/new.png"],
    ["cache_latents.py", *IMAGES, "--vae-path", "VAE", "--num-workers", 0, "--output", "disk/new"],
    ["scripts.train_autoencoder", *IMAGES, "--steps", 1, "--batch-size", 2, "--output", "disk/new"],
    ["export.py", *SAMPLING, "--output", "disk/new"],
    ["export.py", *SAMPLING, "--output", "disk/new", "--format", "published"],
    ["export.py", *SAMPLING, "--output", "disk/new", "--format", "pipeline"],
]  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, checkpoints):  # noqa: F811
    """Folder with the log of a run and a table of routing counts."""
    folder = tmp_path_factory.mktemp("inputs")
    write_log(folder / "run", [row(1), row(2)])
    path = checkpoints["rectified_flow"]
    counts = ("--images-per-class", 1, "--num-sampling-steps", 1, "--output", folder / "counts.npz")
    call_main("expert_data.py", "--ckpt", path, *counts)
    (folder / "disk").mkdir()
    return folder


@pytest.fixture
def disk(inputs):
    """Disk of 4 KB. If no disk can be mounted, files are limited to 500 bytes instead."""
    path = inputs / "disk"
    is_mounted = not subprocess.call(["mount", "-t", "tmpfs", "-o", "size=4k", "none", path])
    with nullcontext() if is_mounted else file_size_limit(500):
        yield path
    if is_mounted:
        subprocess.check_call(["umount", "--lazy", path])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(map(str, command)))
def test_a_full_disk_is_a_one_line_error_and_leaves_only_complete_files(
    command, disk, checkpoints, image_tree, tiny_vae, monkeypatch, capsys  # noqa: F811
):  # fmt: skip
    monkeypatch.chdir(disk.parent)
    paths = {"MODEL": checkpoints["rectified_flow"], "IMAGES": image_tree, "VAE": tiny_vae}
    script, *flags = (paths.get(word, word) for word in command)
    with command_line(script, flags) as module, pytest.raises(SystemExit) as stopped:
        run_main(lambda: module.main(module.parse_args()))
    *_, line = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ")
    for path in [path for path in disk.rglob("*") if path.is_file()]:
        if path.suffix == ".png":
            Image.open(path).load()
        else:
            assert path.suffix == ".json" and json.loads(path.read_text())


WRITER = """
import sys
from pathlib import Path
from runtime.files import write_durably
for _ in range(100):
    write_durably(Path(sys.argv[1]), sys.argv[2])
"""


def test_two_processes_may_write_the_same_file(tmp_path):
    contents = "a" * 10_000, "b" * 20_000
    command = sys.executable, "-c", WRITER, tmp_path / "file"
    writers = [subprocess.Popen([*command, text], cwd=ROOT) for text in contents]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert (tmp_path / "file").read_text() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
