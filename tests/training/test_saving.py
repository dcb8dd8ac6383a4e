"""Checkpoint files that several processes write together."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import Record, config_of
from runtime.processes import ALONE, ProcessError
from runtime.tensor_file import Box, TensorFile
from tools.benchmarks.common import make_engine
from training import saving
from training.config import TrainConfig

TENSORS = {
    "cube": torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)),
    "counts": torch.arange(7), "mask": torch.tensor([True, False, True]),
    "half": torch.arange(3.0).bfloat16(), "number": torch.tensor(3.0), "empty": torch.zeros(0, 4),
}  # fmt: skip


def file_at(path: Path) -> TensorFile:
    kinds = {name: (value.dtype, value.shape) for name, value in TENSORS.items()}
    return TensorFile(path, kinds, {"format": "pt"})


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_several_writers_produce_the_same_file_as_one(tmp_path, dim):
    cube, written = TENSORS["cube"], 0
    for start, stop in ((2, 4), (0, 1), (4, cube.shape[dim]), (1, 2)):
        offset = [0, 0, 0]
        offset[dim] = start
        values = cube.narrow(dim, start, stop - start)
        boxes = {"cube": Box(tuple(cube.shape), tuple(offset), values)}
        if start == 0:
            boxes |= {name: Box.of_all(v) for name, v in TENSORS.items() if name != "cube"}
        written += file_at(tmp_path / "mine").write(boxes, with_header=start == 0)
    save_file(TENSORS, tmp_path / "theirs", {"format": "pt"})
    content = (tmp_path / "mine").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes()
    assert all(torch.equal(v, TENSORS[n]) for n, v in load_file(tmp_path / "mine").items())
    assert written == len(content)


def test_any_failure_of_a_save_is_reported_as_one_that_all_processes_see(tmp_path, monkeypatch):
    """`run_on_all` passes the error to all processes, and the loop logs it and trains on."""
    config = replace(TrainConfig.default(), model=config_of("DiT-Ti/2", depth=1))
    engine = make_engine(config, ALONE)
    saver, left = saving.Saver(tmp_path, engine), tmp_path / "checkpoints" / "writing-0000001.tmp"
    for owner, name in ((TensorFile, "write"), (saving, "write_manifest")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args, **named: {}["a missing name"])
            saver.start(1, Record(config=engine.model.config))
            with pytest.raises(ProcessError, match="KeyError: 'a missing name'"):
                saver.wait()
        assert not left.exists()
    with monkeypatch.context() as patch:  # as when no more memory can be pinned
        patch.setattr(saving, "on_host", lambda tensor: {}["a missing name"])
        with pytest.raises(ProcessError, match="KeyError: 'a missing name'"):
            saver.start(1, Record(config=engine.model.config))
    assert left.parent.exists() and not left.exists()
    saver.start(1, Record(config=engine.model.config))
    assert saver.wait() is None and saver.folder.exists()
