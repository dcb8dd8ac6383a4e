"""check_gpu.py on a CPU: it runs the checks that need no GPU and reports wrong results."""

import json

import pytest
from helpers import ROOT, command_line, expect_error

# Flags that pytest reads from PYTEST_ADDOPTS: the checks of the environment, and one size of the
# experts with two back ends.
FEW_TESTS = '-k "environment or odd-fp32-swiglu-loop or odd-fp32-swiglu-torch" ' + " ".join(
    f"--ignore-glob=*/test_{start}*" for start in ("[!m]", "me", "mod")
)


def test_check_gpu_reports_a_wrong_kernel_and_skips_what_needs_a_gpu(tmp_path, monkeypatch, capsys):
    """A kernel is made 1% too large in the process of the tests."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path.append({str(ROOT)!r})\n"
        "from moe_kernels import torch_kernels\n"
        "right = torch_kernels.grouped_outer\n"
        "torch_kernels.grouped_outer = lambda *arguments: 1.01 * right(*arguments)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_ADDOPTS", FEW_TESTS)
    arguments = ["--device=cpu", "--output", tmp_path / "report"]
    with command_line("check_gpu.py", arguments) as module:
        assert module.main(module.parse_args()) == 1
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["commit"] and content["versions"]["torch"] and content["gpus"]
    environment = [row for row in content["checks"] if "environment" in row["name"]]
    assert {row["result"] for row in environment} == {"pass", "skipped"}
    assert all("GPU" in row["reason"] for row in environment if row["result"] == "skipped")
    measured = [row for row in content["checks"] if row["value"] and "odd-fp32" in row["name"]]
    assert {row["result"] for row in measured if "loop]" in row["name"]} == {"pass"}
    (wrong, *_) = (row for row in measured if "torch]" in row["name"])
    assert wrong["result"] == "fail" and wrong["value"]["largest error"] == pytest.approx(0.01, 0.1)
    assert wrong["threshold"] == "largest error <= 1e-05" and "got 0.01" in wrong["reason"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| FAIL |" in text and all(row["name"] in text for row in content["checks"])
    assert "FAILED" in capsys.readouterr().out


def test_tests_that_do_not_run_are_a_failed_check(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--rootdir=/nowhere")
    with command_line("check_gpu.py", ["--device=cpu", "--output", tmp_path]) as module:
        assert module.main(module.parse_args()) == 1
    (row,) = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert row["result"] == "fail" and row["reason"] == "exit code 4"


@pytest.mark.parametrize("flags, message", [
    ((), "--device cpu"), (("--device", "abacus"), "abacus"),
])  # fmt: skip
def test_wrong_check_gpu_arguments_are_one_line_errors(tmp_path, flags, message, capsys):
    assert message in expect_error(capsys, "check_gpu.py", *flags, "--output", tmp_path / "r")
    assert not (tmp_path / "r").exists()
