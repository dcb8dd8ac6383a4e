"""diffusers' own tests, on exported pipelines; see diffusers_peers.py.

git clone --branch v0.42.1 https://github.com/huggingface/diffusers   # the installed version
pip install parameterized requests_mock peft torchao
DIFFUSERS_CHECKOUT=$PWD/diffusers python -m pytest tests/peers
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, call_main
from test_models import randomised

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")


@pytest.mark.skipif(CHECKOUT is None, reason="DIFFUSERS_CHECKOUT names no checkout of diffusers")
def test_exported_pipelines_pass_the_tests_of_diffusers(tmp_path, tiny_vae):
    from helpers import save_checkpoint

    new = randomised(class_dropout_prob=0.1, learn_sigma=False)
    facts = {"objective": "rectified_flow", "vae_path": str(tiny_vae)}
    sources = {
        "demo": ROOT / "assets/demo", "emoji": ROOT / "assets/demo-emoji",
        "new": save_checkpoint(new, tmp_path / "new.safetensors", **facts),
    }  # fmt: skip
    for name, source in sources.items():
        output = ("--output", tmp_path / "exports" / name)
        call_main("export.py", "--ckpt", source, "--format", "pipeline", "--samples", 0, *output)
    peers = tmp_path / "peers.py"
    peers.write_text((Path(__file__).parent / "diffusers_peers.py").read_text())
    result = subprocess.run(
        [sys.executable, "-m", "pytest", peers, "-q", "-rfEs", "--noconftest", "-c", os.devnull,
         "-o", "python_files=*.py", "-p", "no:cacheprovider"],
        cwd=CHECKOUT, capture_output=True, text=True,
        env={**os.environ, "EXPORTS": str(tmp_path / "exports"), "PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 100
    print(result.stdout[-3000:])
