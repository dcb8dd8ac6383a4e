"""check_gpu.py on a CPU: what it can check there, and that it finds what is wrong."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, command_line, expect_error, run_script

from checks.common import LIMITS

SMALL = ["--device=cpu", "--quick"]


def report_of(folder: Path) -> dict[str, list[dict]]:
    stages = json.loads((folder / "report.json").read_text())["stages"]
    return {stage["stage"]: stage["checks"] for stage in stages}


def results_of(checks: list[dict]) -> set[str]:
    return {row["result"] for row in checks}


def test_a_machine_without_a_gpu_is_checked_as_far_as_it_goes(tmp_path):
    stages = ["environment", "kernels", "memory"]
    run_script("check_gpu.py", *SMALL, "--stages", *stages, "--output", tmp_path)
    found = report_of(tmp_path)
    assert list(found) == stages
    for checks in found.values():
        assert results_of(checks) <= {"pass", "info", "skipped"}
        assert all(row["reason"] for row in checks if row["result"] == "skipped")
    measured = [row for row in found["kernels"] if isinstance(row["value"], float)]
    assert len(measured) > 20 and all(row["threshold"] for row in measured)
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["commit"] and content["versions"]["torch"] and content["gpus"]
    text = (tmp_path / "report.md").read_text()
    assert all(row["name"] in text for checks in found.values() for row in checks)


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
    monkeypatch.setitem(LIMITS, "environment", (1, 1))
    given = [*SMALL, "--stages", "environment", "kernels", "--output", tmp_path / "report"]
    with command_line("check_gpu.py", given) as module:
        assert module.main(module.parse_args()) == 1
    found = report_of(tmp_path / "report")
    (late,) = found["environment"]
    assert late["result"] == "fail" and late["reason"] == "time limit"
    wrong = {row["name"] for row in found["kernels"] if row["result"] == "fail"}
    assert any("grouped_outer" in name for name in wrong)
    assert any("grouped by torch" in name for name in wrong)
    assert "pass" in results_of(found["kernels"])
    assert "**FAIL**" in (tmp_path / "report" / "report.md").read_text()
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--gpus=99"]])
def test_without_the_gpus_that_are_asked_for_it_is_one_line(tmp_path, flags, capsys):
    line = expect_error(capsys, "check_gpu.py", *flags, "--output", tmp_path / "r")
    assert "--device cpu" in line or "at most" in line
    assert not (tmp_path / "r").exists()
