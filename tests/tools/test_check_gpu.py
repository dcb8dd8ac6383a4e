"""check_gpu.py on a CPU: it runs the checks that need no GPU and reports wrong results."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, call_main, command_line, expect_error

SMALL = ["--device=cpu", "--quick"]
# Flags that pytest reads from PYTEST_ADDOPTS. They select one size with two back ends.
FEW_TESTS = '-k "odd-fp32-swiglu-loop or odd-fp32-swiglu-torch" ' + " ".join(
    f"--ignore-glob=*/test_{start}*" for start in ("[!m]", "me", "mod")
)


def report_of(folder: Path) -> dict[str, list[dict]]:
    stages = json.loads((folder / "report.json").read_text())["stages"]
    return {stage["stage"]: stage["checks"] for stage in stages}


def test_check_gpu_skips_the_gpu_checks_on_a_machine_without_a_gpu(tmp_path):
    call_main("check_gpu.py", *SMALL, "--stages", "environment", "--output", tmp_path)
    found = report_of(tmp_path)
    assert list(found) == ["environment"]
    checks = found["environment"]
    assert {row["result"] for row in checks} == {"pass", "skipped"}
    assert all("GPU" in row["reason"] for row in checks if row["result"] == "skipped")
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["commit"] and content["versions"]["torch"] and content["gpus"]
    text = (tmp_path / "report.md").read_text()
    assert all(row["name"] in text for row in checks)


def test_check_gpu_reports_a_wrong_kernel_and_a_stage_timeout(tmp_path, monkeypatch, capsys):
    """A kernel is made 1% too large in the stage's process; the remaining stages still run."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "from moe_kernels import torch_kernels\n"
        "right = torch_kernels.grouped_outer\n"
        "torch_kernels.grouped_outer = lambda *arguments: 1.01 * right(*arguments)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_ADDOPTS", FEW_TESTS)
    arguments = [*SMALL, "--stages", "environment", "tests", "--output", tmp_path / "report"]
    with command_line("check_gpu.py", arguments) as module:
        monkeypatch.setitem(module.LIMITS, "environment", (1, 1))
        assert module.main(module.parse_args()) == 1
    found = report_of(tmp_path / "report")
    (late,) = (row for row in found["environment"] if row["result"] == "fail")
    assert "time limit" in late["reason"]
    measured = [row for row in found["tests"] if row["value"] and "odd-fp32" in row["name"]]
    assert {row["result"] for row in measured if "loop]" in row["name"]} == {"pass"}
    (wrong, *_) = (row for row in measured if "torch]" in row["name"])
    assert wrong["result"] == "fail" and wrong["value"]["largest error"] == pytest.approx(0.01, 0.1)
    assert wrong["threshold"] == "largest error <= 1e-05" and "got 0.01" in wrong["reason"]
    assert "| FAIL |" in (tmp_path / "report" / "report.md").read_text()
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--stages", "fast"]])
def test_wrong_check_gpu_arguments_are_one_line_errors(tmp_path, flags, capsys):
    line = expect_error(capsys, "check_gpu.py", *flags, "--output", tmp_path / "r")
    assert "--device cpu" in line or "fast" in line
    assert not (tmp_path / "r").exists()
