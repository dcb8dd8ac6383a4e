"""Launched processes: the warning about restarts, and how processes end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, run_script, running, wait_for

from runtime.errors import printable
from runtime.processes import setup_distributed


def test_a_printed_line_keeps_its_spaces_and_loses_its_control_characters():
    assert printable("  a   b\tc\n  d \r e\x1b[1m\n") == "  a   b c d e?[1m"


@pytest.mark.parametrize("shared, count", [("True", 1), ("False", 0)])
def test_torchrun_restarts_with_a_shared_store_give_a_warning(monkeypatch, capsys, shared, count):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    setup_distributed()
    assert capsys.readouterr().out.count("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == count


def is_running(process: Path) -> bool:
    """Whether a process, named by its folder in /proc, runs; a zombie keeps its folder."""
    try:
        return ") Z " not in (process / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end a process with its parent")
def test_a_training_process_ends_when_its_torchrun_is_killed(tmp_path):
    """An orphaned process would continue training and keep the run folder locked."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, time, runtime\nprint('process', os.getpid(), flush=True)\ntime.sleep(300)\n"
    )
    with running(script, [], processes=1, PYTHONPATH=str(ROOT)) as process:
        worker = Path("/proc") / wait_for(process, "process ").split()[-1]
        process.kill()
        deadline = time.monotonic() + 10
        while is_running(worker) and time.monotonic() < deadline:
            time.sleep(0.05)
        if alive := is_running(worker):
            os.kill(int(worker.name), signal.SIGKILL)
    assert not alive


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_gives_no_traceback(tmp_path, unbuffered):
    script = tmp_path / "plan.py"
    script.write_text(
        "from runtime.errors import run_main\n"
        "run_main(lambda: [print(n, end=n * ' ') for n in range(2000)] and 0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = ["bash", "-c", f"{sys.executable} {script} | head -c 1; exit ${{PIPESTATUS[0]}}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.stderr == "" and ended.stdout == "0"
    assert ended.returncode == 128 + signal.SIGPIPE


INTERRUPTED = """
import signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C

class Interrupt:
    def find_spec(name, *rest):
        if name in ("torch", "matplotlib", "numpy"):
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:  # as torch does in its C++ parts
                raise TypeError from None

sys.meta_path.insert(0, Interrupt)
"""


SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")])
    if "__main__" in path.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_imports_of_a_script_prints_no_traceback(tmp_path, script):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    output = run_script(script, check=False, PYTHONPATH=f"{tmp_path}:{ROOT}").stderr
    assert "Traceback" not in output
    assert "interrupted" in output or "arguments are required" in output
