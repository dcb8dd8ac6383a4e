"""Fixtures and helpers shared by the tests: tiny images, a tiny autoencoder, processes."""

import functools
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from PIL import Image
from safetensors.torch import load_file

from checkpoints import Record, save_model
from checkpoints.checkpoint import averages_of
from runtime.errors import printable, run_main
from runtime.processes import LAUNCHER_VARIABLES, Distributed, close_distributed, run_process
from training.engines.state import read_state
from training.manifest import MANIFEST_FILE, write_manifest

# One thread in this process and in every process that a test starts: a different number of threads
# may round differently, and threads that wait for each other are slow while other tests run.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

FOREIGN_VARIABLES = (  # of a job, scripts/launch.sh and scripts/demo.sh
    *LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE", "DIT_MOE_SAVED", "DATA", "LATENTS", "IMAGES", "VAE",
    "BATCH", "MICRO", "NODES", "GPUS", "NODE_RANK", "NUMA", "DEMO_STEPS",
)  # fmt: skip
ROOT = Path(__file__).parent.parent
SMALL = dict(hidden_size=32, depth=2, num_heads=2)  # where the size does not matter
TINY_MODEL = dict(
    input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10, num_experts=4
)  # fmt: skip


def pytest_addoption(parser) -> None:
    parser.addoption("--kills", type=int, default=2, help="how often a test kills its run")
    parser.addoption("--gpu", action="store_true", help="run only the GPU tests")
    parser.addoption("--core", action="store_true", help="only the tests of the core's minute")
    parser.addoption("--fake", action="store_true", help="also run the slow tests on fake CUDA")
    parser.addoption("--report", type=Path, help="file to which each test appends a JSON line")


def pytest_configure(config) -> None:
    """Hides the GPU from the tests and the processes they start, unless --gpu is given.

    torch has not looked for a GPU at this point.
    """
    for line in (
        "gpu: runs with and without --gpu", "needs_gpu: runs only with --gpu", "needs_triton",
        "needs_fake: runs only with --fake",
    ):  # fmt: skip
        config.addinivalue_line("markers", line)
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: torch finds no GPU")
    # Nothing of the user's shell or home reaches the tests, and their processes share no cache.
    for name in {*FOREIGN_VARIABLES, *(name for name in os.environ if name.startswith("LC_"))}:
        os.environ.pop(name, None)
    os.environ["HF_HOME"] = home = tempfile.mkdtemp(prefix="huggingface-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    path = config.getoption("--report")
    if path and not hasattr(config, "workerinput"):  # workers of pytest-xdist report to the first
        config.pluginmanager.register(Reporter(path))


class Reporter:
    """Appends one JSON row per finished test, with its measurements, for check_gpu.py."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        name = report.nodeid.rpartition("/")[2].removeprefix("test_").replace(".py::test_", ": ")
        result = {"passed": "pass", "failed": "fail"}.get(report.outcome, report.outcome)
        measured = [(name, *pair) for name, pair in report.user_properties]
        value = {n: v if isinstance(v, str) or math.isfinite(v) else str(v) for n, v, _ in measured}
        limits = ", ".join(f"{name} {limit}" for name, _, limit in measured if limit)
        reason = report.longrepr[2] if report.skipped else report.longreprtext[-3000:]
        row = {
            "name": name.replace("_", " "), "result": result, "value": value or None,
            "threshold": limits, "reason": printable(reason)[-3000:],
        }  # fmt: skip
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


# Files whose tests share no fixture that takes long: their tests go to any worker of pytest-xdist.
# The tests of any other file stay together.
INDEPENDENT = {"test_interruptions", "test_processes", "test_check_gpu"}
# What takes longest starts first, so that no worker ends with it.
SLOWEST = (
    "test_fsdp.py", "test_deepspeed.py", "test_kernels.py", "test_two_processes_recover",
    "test_app.py", "test_training.py", "test_fake_cuda.py", "test_docs.py", "test_experiments.py",
    "test_router_runs.py", "test_analysis.py", "test_runs.py", "test_evaluation",
    "test_demo_assets.py", "test_check_gpu_reports", "test_a_run_killed",
    "test_a_run_stopped", "test_quantized.py", "test_export.py", "test_sampling.py",
    "test_recipes.py", "test_finetune.py", "test_offload.py", "test_prompts.py",
    "test_autoencoders.py", "test_published_moe.py", "test_own_data.py", "test_benchmarks.py",
)  # fmt: skip
# What --core leaves to the full suite: what launches processes, and what takes long.
FULL_SUITE_ONLY = (
    "test_fsdp.py", "test_deepspeed.py", "test_cluster.py", "test_kernels.py", "test_fake_cuda.py",
    "test_interruptions.py", "test_processes.py", "test_long_runs.py", "test_docs.py",
    "test_router_runs.py", "test_recipes.py", "test_finetune.py", "test_analysis.py",
    "test_evaluation.py", "test_heldout.py", "test_sampled_images.py", "test_export.py",
    "test_offload.py", "test_pressing_ctrl_c_again", "test_what_shapes_the_state",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class FilesOrTests(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if Path(file).stem in INDEPENDENT else file

    return FilesOrTests(config, log)


def pytest_collection_modifyitems(config, items) -> None:
    if config.getoption("--gpu"):
        names = {"gpu", "needs_gpu"}
        chosen = [item for item in items if names & {mark.name for mark in item.iter_markers()}]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    if config.getoption("--core"):
        left = [item for item in items if any(name in item.nodeid for name in FULL_SUITE_ONLY)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist
        items.sort(key=place_of)


def pytest_collection_finish(session) -> None:
    """Keeps collections of garbage from going through what the imports made each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session) -> None:
    """Frozen objects are never freed, which some libraries report as leaks at the end."""
    gc.unfreeze()


def place_of(item) -> int:
    """Place of a test, or of its file, in SLOWEST."""
    found = [name in item.nodeid for name in SLOWEST]
    return found.index(True) if True in found else len(SLOWEST)


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory) -> Path:
    """Four classes of ten 40 x 36 images each: noise with a colour cast for each class."""
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
    from diffusers import AutoencoderKL  # slow, and not needed by the process that schedules tests

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
def latent_cache(image_tree, tiny_vae, tmp_path_factory) -> Path:
    """Latents and features of the image tree. Tests that change files copy the folder."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    call_main(
        "cache_latents.py", "--data-path", image_tree, "--vae-path", tiny_vae, "--image-size", 16,
        "--features", "efficientnet-lite0", "--feature-tokens", "--output", folder,
        "--num-workers", 0,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def train_flags(image_tree, tiny_vae):
    """Function that returns the flags of an fp32 training run that takes seconds.

    Keywords add or replace flags; None removes a flag. Passing `model` also removes the flags that
    make the model small, and `model=None` leaves the model to the weights.
    """

    def make(results: Path, **changes) -> list[str]:
        values = {
            "data-path": image_tree, "vae-path": tiny_vae, "image-size": 16, "model": "DiT-Ti/2",
            **({} if "model" in changes else SMALL),
            "num_experts": 4, "precision": "fp32", "results-dir": results, "num-workers": 0,
            "num-sample": 0, "lr": 1e-3, "ema": "exponential:decay=0.9", "global-batch-size": 16,
            **changes,
        }  # fmt: skip
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    return make


@functools.cache
def triton_fault() -> str:
    """Reason why Triton kernels cannot run here, or "". Some interpreters fail with a new NumPy."""
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


needs_triton = pytest.mark.needs_triton
needs_gpu = pytest.mark.needs_gpu
HAS_EXTRAS = (ROOT / "extras").exists()
needs_extras = pytest.mark.skipif(not HAS_EXTRAS, reason="needs extras/")


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("needs_triton") and (fault := triton_fault()):
        pytest.skip(fault)
    if item.get_closest_marker("needs_fake") and not item.config.getoption("--fake"):
        pytest.skip("takes minutes, needs pytest --fake")
    if item.get_closest_marker("needs_gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and pytest --gpu")


@pytest.fixture(scope="session", autouse=True)
def short_previews():
    """Sample grids of runs in this process take four steps, not the 50 of their default."""
    from training import preview

    short = functools.partial(preview.SamplerSettings, num_steps=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "SamplerSettings", short)
        yield


@pytest.fixture
def at_most(record_property):
    """Asserts that a number is at most a limit, and puts both into the report of the tests."""
    return functools.partial(check_limit, record_property, "<=")


@pytest.fixture
def at_least(record_property):
    """Asserts that a number is at least a limit, and puts both into the report of the tests."""
    return functools.partial(check_limit, record_property, ">=")


@pytest.fixture
def quick_compile(monkeypatch, request) -> None:
    """Makes torch.compile run its graphs as they are, without graph breaks, which takes seconds on
    a CPU. The parameter `aot_eager` also traces their backward passes, which takes twice as long.
    """
    backend = getattr(request, "param", "eager")
    quick = functools.partial(torch.compile, fullgraph=True, backend=backend)
    monkeypatch.setattr(torch, "compile", quick)


def check_limit(record_property, sign: str, name: str, value: float, limit: float) -> None:
    record_property(name, (value, f"{sign} {limit:g}"))
    is_right = value <= limit if sign == "<=" else value >= limit
    assert is_right, f"{name}: got {value:g}, expected {sign} {limit:g}"


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want| for two tensors of the same shape."""
    assert got.shape == want.shape
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


@contextmanager
def command_line(script: str, arguments: tuple):
    """Imports a script's module and sets sys.argv to a command line of the script."""
    module = importlib.import_module(script.removesuffix(".py"))
    argv, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        yield module
    finally:
        sys.argv = argv


def call_main(script: str, *arguments) -> None:
    """Calls a script's `main` in this process, which is fast and passes a UserError on."""
    with command_line(script, arguments) as module:
        assert not module.main(module.parse_args())  # an exit code, or None


def expect_error(capsys, script: str, *arguments) -> str:
    """Asserts that a script exits with code 2 after a one-line error, and returns the line."""
    capsys.readouterr()
    with command_line(script, arguments) as module, pytest.raises(SystemExit) as stopped:
        run_main(lambda: module.main(module.parse_args()))
    lines = capsys.readouterr().err.rstrip().split("\n")
    (line,) = [line for line in lines if not line.startswith("\r")]  # without progress bars
    assert stopped.value.code == 2 and line.startswith("error: ") and line.isprintable()
    return line


def list_files(folder: Path) -> None:
    """Rewrites the manifest of a checkpoint so that it matches the files as they are."""
    (folder / MANIFEST_FILE).unlink()
    files = (path for path in folder.rglob("*") if path.is_file())
    write_manifest(folder, {str(p.relative_to(folder)): p.stat().st_size for p in files})


def command(script: Path | str, arguments: tuple | list, processes: int, *launcher: str) -> dict:
    """Arguments for subprocess that run a script, under torchrun if `processes` is not 0."""
    start = [sys.executable]
    if processes:
        nproc = f"--nproc_per_node={processes}"
        start += ["-m", "torch.distributed.run", "--standalone", nproc, *launcher]
    return {"args": [*start, str(ROOT / script), *map(str, arguments)], "env": dict(os.environ)}


def run_script(
    script: str, *arguments, processes: int = 0, check: bool = True, **environment
) -> subprocess.CompletedProcess:
    """Runs a script of the repository and waits until it ends."""
    call = command(script, arguments, processes)
    call["env"] |= environment
    result = subprocess.run(**call, capture_output=True, text=True, timeout=600)
    if check and result.returncode:
        raise AssertionError(f"{script} failed:\n{result.stdout}\n{result.stderr}")
    return result


@contextmanager
def running(script: str, arguments: list, processes: int, launcher: tuple = (), **environment):
    """Starts a script under torchrun in a new session, and kills all processes at the end."""
    call = command(script, arguments, processes, *launcher)
    call["env"] |= environment
    process = subprocess.Popen(
        **call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        kill_all(process)
        process.stdout.close()


@contextmanager
def running_alone(script: str, arguments: list):
    """Starts a script in a new session without torchrun, and kills all of its processes at the end.

    The fork server starts it, which has done the slow imports.
    """
    with running_forked(main_of_script, script, arguments) as process:
        yield process


@contextmanager
def running_forked(main, *given, **environment):
    """Calls main(*given) in a new session, with stderr in stdout, and kills all of its processes at
    the end. The fork server starts it, which has done the slow imports."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("forkserver")
    forked = context.Process(target=call_in_session, args=(writer, environment, main, *given))
    forked.start()
    writer.close()
    with os.fdopen(os.dup(reader.fileno())) as output:
        process = SimpleNamespace(
            pid=forked.pid, stdout=output, poll=lambda: forked.exitcode,
            wait=lambda: forked.join() or forked.exitcode,
        )  # fmt: skip
        try:
            yield process
        finally:
            kill_all(process)


def call_in_session(output: Connection, environment: dict[str, str], main, *given) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    sys.stdout.reconfigure(line_buffering=True)
    os.environ |= environment
    run_process(functools.partial(main, *given))


def main_of_script(script: str, arguments: list) -> int | None:
    with command_line(script, arguments) as module:
        return module.main(module.parse_args())


def main_of_torchrun(script: Path | str, arguments: list, processes: int, *launcher: str) -> None:
    """torchrun with processes that it forks. It does not notice that they end with exit code 0."""
    from torch.distributed.run import main

    forks = "--standalone", f"--nproc_per_node={processes}", "--run-path", "--start-method=fork"
    main([*forks, *launcher, str(ROOT / script), *map(str, arguments)])


def kill_all(process: subprocess.Popen | SimpleNamespace) -> None:
    """Kills a process and all of its descendants."""
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def children(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except FileNotFoundError:
        return []


def descendants(pid: int) -> list[int]:
    return [p for child in children(pid) for p in (child, *descendants(child))]


def wait_for(process: subprocess.Popen, text: str, seconds: float = 240) -> str:
    """Reads the output of a process until it contains `text`, and returns the output so far."""
    output, deadline = "", time.monotonic() + seconds
    while text not in output:
        line = process.stdout.readline()
        assert line and time.monotonic() < deadline, f"no {text!r} in:\n{output}"
        output += line
    return output


# Modules that take seconds to import. The fork server imports them once for all processes below.
SLOW_IMPORTS = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "diffusers.models.autoencoders.autoencoder_kl",
    "timm.optim.muon",
    "training.loop",
    "training.engines.fsdp",
]
torch.multiprocessing.set_forkserver_preload(SLOW_IMPORTS)


@contextmanager
def open_browser(**capabilities):
    """A headless Chromium. Skips the test if there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("needs the programs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    for name, value in capabilities.items():
        options.set_capability(name, value)
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    try:
        yield driver
    finally:
        driver.quit()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def resident(kind: str = "VmRSS") -> int:
    """Bytes of this process in memory, including mapped files; "VmHWM" is their maximum so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def process_pool(processes: int) -> ProcessPoolExecutor:
    context = torch.multiprocessing.get_context("forkserver")
    # Full collections of garbage skip the frozen modules: sixty tiny steps take a fifth less time.
    return ProcessPoolExecutor(processes, mp_context=context, initializer=gc.freeze)


def in_process(function, *arguments):
    """Calls a top-level function in a new process; returns its result or raises its exception."""
    with process_pool(1) as pool:
        return pool.submit(function, *arguments).result()


def in_processes(function, *arguments, processes: int = 2) -> list:
    """Calls function(dist, *arguments) in each process of a new process group on the CPU.

    Returns the result of each process. The function must be a top-level function of a module,
    because the processes import it by name.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with process_pool(processes) as pool:
        calls = [
            pool.submit(call_in_group, rank, processes, store.port, function, arguments)
            for rank in range(processes)
        ]
        return [call.result() for call in calls]


def call_in_group(rank: int, processes: int, port: int, function, arguments: tuple):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=120)
    )
    try:
        return function(Distributed(rank, rank, processes, torch.device("cpu")), *arguments)
    finally:
        close_distributed()


def main_in_processes(script: str, *arguments, processes: int = 2) -> None:
    """Calls a script's `main` in new processes, as a launcher does but without its start."""
    in_processes(main_of_rank, script, arguments, processes=processes)


def main_of_rank(dist: Distributed, script: str, arguments: tuple) -> None:
    ranks = {"RANK": dist.rank, "LOCAL_RANK": dist.local_rank, "WORLD_SIZE": dist.world_size}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    call_main(script, *arguments)


def train_on(dist: Distributed, *commands: list[str]) -> None:
    """Runs train.py's commands one after another in an existing process group."""
    from training.config import parse_training
    from training.start import train

    for arguments in commands:
        command, said = parse_training("train.py", None, arguments)
        assert train(command, said, dist) == 0


def config_of_command(*arguments, script: str = "train.py"):
    """The config of a command of a training script, without what follows from the data."""
    from training.config import TrainConfig, parse_training

    _, said = parse_training(script, None, [*map(str, arguments)])
    return TrainConfig.default(script).changed(said)


# Checkpoints, and files that a run leaves behind.


def save_checkpoint(model: torch.nn.Module, path: Path, /, **facts) -> Path:
    """Saves a model with a record of the given facts; returns the path."""
    save_model(path, model.state_dict(), Record(config=model.config, **facts))
    return path


def only_run(results: Path) -> Path:
    (run,) = results.iterdir()
    return run


def rows(results: Path) -> list[dict]:
    """Rows of log.jsonl of the only run in a results folder."""
    lines = (only_run(results) / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def step_folder(results: Path, step: int) -> Path:
    return only_run(results) / "checkpoints" / f"{step:07d}"


def flat(value: object, path: str = "") -> dict[str, object]:
    """Leaves of nested dicts and lists, by path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f"{path}/{key}").items()}
    return {path: value}


def state_of(folder: Path) -> dict[str, object]:
    """All weights, EMA weights and optimizer state of a checkpoint folder of train.py.

    The shards of a tensor are joined, as in a resumed run.
    """
    state, _ = read_state(folder, {}, {}, torch.device("cpu"))
    return flat({**state, "ema": load_file(folder / "model.safetensors")})


def assert_same_values(a: dict[str, object], b: dict[str, object]) -> None:
    """Asserts that two dicts have the same keys and bit-identical values."""
    assert a.keys() == b.keys()
    for name, value in b.items():
        same = torch.equal(a[name], value) if torch.is_tensor(value) else a[name] == value
        assert same, name


def assert_unaveraged(step: Path) -> None:
    """Asserts that a checkpoint has no average: its model file has the weights of its state."""
    weights = load_file(step / "model.safetensors")
    titles = {f"/model/{name}": value.flatten() for name, value in weights.items()}
    state = {title: value for title, value in state_of(step).items() if title in titles}
    assert [*averages_of(step)] == ["none"] and any("experts" in title for title in state)
    assert_same_values({t: titles[t] for t in state}, {t: v.flatten() for t, v in state.items()})


def assert_same_state(got: Path, want: Path) -> None:
    assert_same_values(state_of(got), state_of(want))
