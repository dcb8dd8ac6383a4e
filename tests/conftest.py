"""Tiny real parts that the tests share: an image tree, an autoencoder, processes."""

import functools
import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# Without a GPU the Triton kernels are interpreted. Triton reads this when others import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# One thread here and in every process that a test starts: another number may round differently, and
# threads that wait for each other are slow where other tests run beside them.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent
TINY_MODEL = dict(
    input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10, num_experts=4
)  # fmt: skip


def pytest_addoption(parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="how often a run is killed in a test")


# Those of more than half a minute. Handed out first, so that no worker is left with one at the end.
SLOW_FILES = [
    f"test_{name}.py"
    for name in ("interruptions", "deepspeed", "checkpoint_safety", "training", "latents", "moe")
]


def pytest_collection_modifyitems(config, items) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        place = {name: number for number, name in enumerate(SLOW_FILES)}
        items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory) -> Path:
    """Four classes of ten 40 x 36 images each: gradients whose colour tells the class."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in range(4):
        (root / f"class-{label}").mkdir()
        for number in range(10):
            pixels = rng.integers(0, 100, (40, 36, 3))
            pixels[..., label % 3] += 20 + 30 * label
            path = root / f"class-{label}" / f"{number:02d}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory) -> Path:
    """A random AutoencoderKL with downsampling factor 2, in diffusers' format."""
    from diffusers import AutoencoderKL  # not by the process that only hands tests out

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    vae.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def train_flags(image_tree, tiny_vae):
    """Flags of a run of seconds, and others or None in their place; fp32, to compare runs by."""

    def make(results: Path, **changes) -> list[str]:
        values = {
            "data-path": image_tree, "vae-path": tiny_vae, "image-size": 16, "model": "DiT-Ti/2",
            "num_experts": 4, "precision": "fp32", "results-dir": results, "num-workers": 0,
            "num-sample": 0, "lr": 1e-3, "ema-decay": 0.9, **changes,
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    return make


@functools.cache
def triton_fault() -> str:
    """Why Triton kernels cannot run here, or nothing: some interpreters cannot with new NumPy."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    if torch.cuda.is_available():
        return ""
    import triton

    @triton.jit
    def loop(end):
        for _ in range(triton.language.load(end)):
            pass

    try:
        loop[(1,)](torch.ones(1, dtype=torch.int32))
    except (triton.runtime.errors.InterpreterError, RuntimeError) as error:
        return f"Triton {triton.__version__} cannot interpret with NumPy {np.__version__}: {error}"
    return ""


needs_triton = pytest.mark.skipif(bool(triton_fault()), reason=triton_fault())


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| of two tensors of one shape."""
    assert got.shape == want.shape
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


@contextmanager
def command_line(script: str, arguments: tuple):
    """The module of a script, while sys.argv is a command line of it."""
    module = importlib.import_module(script.removesuffix(".py"))
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    precision = torch.get_float32_matmul_precision()
    try:
        yield module
    finally:
        sys.argv = argv
        torch.set_float32_matmul_precision(precision)


def call_main(script: str, *arguments) -> None:
    """Calls a script's `main` in this process: quicker, and a UserError comes out as one."""
    with command_line(script, arguments) as module:
        assert not module.main.__wrapped__(module.parse_args())  # an exit code, or None


def expect_error(capsys, script: str, *arguments) -> str:
    """Calls a script's `main`, which has to exit with code 2 after one line; returns that line."""
    capsys.readouterr()
    with command_line(script, arguments) as module, pytest.raises(SystemExit) as stopped:
        module.main(module.parse_args())
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert stopped.value.code == 2 and line.startswith("error: ") and line.isprintable()
    return line


def run_script(
    script: str, *arguments, processes: int = 0, check: bool = True, **environment
) -> subprocess.CompletedProcess:
    """Runs a script of the repository, under real torchrun when `processes` is given."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    result = subprocess.run(
        [*launcher, str(ROOT / script), *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if check and result.returncode:
        raise AssertionError(f"{script} failed:\n{result.stdout}\n{result.stderr}")
    return result
