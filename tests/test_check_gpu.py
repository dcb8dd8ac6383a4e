"""check_gpu.py on a CPU: what it can check there, and that it finds what is wrong."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, call_main, command_line, expect_error

SMALL = ["--device=cpu", "--quick"]
# Flags that pytest reads from PYTEST_ADDOPTS: of test_moe.py, one size with three back ends.
FEW_TESTS = "--ignore-glob=*/test_[!m]* -k odd-fp32-swiglu"


def report_of(folder: Path) -> dict[str, list[dict]]:
    stages = json.loads((folder / "report.json").read_text())["stages"]
    return {stage["stage"]: stage["checks"] for stage in stages}


def test_a_machine_without_a_gpu_is_checked_as_far_as_it_goes(tmp_path):
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


def test_a_wrong_kernel_and_a_stage_out_of_time_are_in_the_report(tmp_path, monkeypatch, capsys):
    """A product that is off by a hundredth, in the stage's process; the stages go on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "from moe_kernels import torch_kernels\n"
        "right = torch_kernels.grouped_outer\n"
        "torch_kernels.grouped_outer = lambda *given: 1.01 * right(*given)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_ADDOPTS", FEW_TESTS)
    given = [*SMALL, "--stages", "environment", "tests", "--output", tmp_path / "report"]
    with command_line("check_gpu.py", given) as module:
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
def test_a_mistake_in_the_command_is_one_line(tmp_path, flags, capsys):
    line = expect_error(capsys, "check_gpu.py", *flags, "--output", tmp_path / "r")
    assert "--device cpu" in line or "fast" in line
    assert not (tmp_path / "r").exists()
