"""A full disk is a one-line error, and files are written completely or not at all."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
from helpers import ROOT, expect_error
from test_plot_run import row, write_log
from test_runs import file_size_limit


@pytest.fixture
def disk(tmp_path):
    """Disk of 4 KB. If no disk can be mounted, files are limited to 500 bytes instead."""
    path = tmp_path / "disk"
    path.mkdir()
    is_mounted = not subprocess.call(["mount", "-t", "tmpfs", "-o", "size=4k", "none", path])
    with nullcontext() if is_mounted else file_size_limit(500):
        yield path
    if is_mounted:
        subprocess.check_call(["umount", "--lazy", path])


def test_a_full_disk_is_a_one_line_error_and_leaves_no_incomplete_file(disk, tmp_path, capsys):
    write_log(tmp_path / "run", [row(1), row(2)])
    arguments = tmp_path / "run", "--output", disk / "new.png"
    assert "new.png" in expect_error(capsys, "plot_run.py", *arguments)
    assert not [path for path in disk.rglob("*") if path.is_file()]


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
