"""Checkpoints: every change to the file is found, no code runs, and what is not finite is never written."""

import hashlib
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pmd.checkpoint_file import FOOTER_BYTES, FORMAT, MAGIC, read_checkpoint, write_checkpoint
from pmd.errors import CheckpointError, DiskError


def state(**changes):
    return {
        "pmd": {"format": FORMAT, "version": "0", "config": {"seed_everything": 0, "model": {"path": "tiny"}}},
        "state_dict": {"weight": torch.arange(30.0).reshape(5, 6), "bytes": torch.arange(3, dtype=torch.uint8)},
        "epoch": 1, "global_step": 2, "policy_version": 2, "loops": {}, "lr_schedulers": [],
        "callbacks": {"memory": {"database": torch.arange(99, dtype=torch.uint8)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(5, 6)}}, "param_groups": [{"betas": (0.9, 0.95)}]}],
        "RolloutDataModule": {"epoch": 2, "owed": ("a",)},
    } | changes  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    write_checkpoint(path, state())
    return path


@pytest.mark.parametrize("mmap", [True, False])
def test_what_was_written_is_read(checkpoint, mmap):
    found = read_checkpoint(checkpoint, mmap=mmap)
    assert torch.equal(found["state_dict"]["weight"], state()["state_dict"]["weight"])
    assert found["optimizer_states"][0]["param_groups"] == [{"betas": (0.9, 0.95)}]
    assert found["RolloutDataModule"] == {"epoch": 2, "owed": ("a",)}
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1  # other programs can read it


def test_every_flipped_bit_is_found(checkpoint):
    data, draw = checkpoint.read_bytes(), random.Random(0)
    last = range(8 * (len(data) - FOOTER_BYTES - 4), 8 * len(data))  # the footer, and what is before it
    for bit in [*draw.sample(range(8 * len(data)), 300), *last]:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        checkpoint.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged"):
            read_checkpoint(checkpoint)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999, 1.001])
def test_a_truncated_or_longer_file_is_found(checkpoint, share):
    data = checkpoint.read_bytes()
    checkpoint.write_bytes((data + bytes(99))[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"is no whole checkpoint"):
        read_checkpoint(checkpoint)


class Payload:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("program", ["torch", "pickle", "with a digest"])
def test_no_code_runs(tmp_path, program):
    """Not even if the digest is right."""
    path, target = tmp_path / "foreign.ckpt", tmp_path / "executed"
    if program == "torch":
        torch.save(state(extra=Payload(target)), path)
    elif program == "pickle":
        path.write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save(state(extra=Payload(target)), path)
        path.write_bytes(path.read_bytes() + MAGIC + hashlib.sha256(path.read_bytes()).digest())
    with pytest.raises(CheckpointError, match=r"another program|more than tensors"):
        read_checkpoint(path)
    assert not target.exists()


def test_the_remedy_is_the_other_checkpoint_if_that_is_whole(checkpoint):
    best = checkpoint.with_name("best.ckpt")
    write_checkpoint(best, state())
    for damaged, other in ((checkpoint, best), (best, checkpoint)):
        data = damaged.read_bytes()
        damaged.write_bytes(data[:-1])
        with pytest.raises(CheckpointError, match=rf"use {other} instead, with --ckpt_path={other.stem}"):
            read_checkpoint(damaged)
        damaged.write_bytes(data)
    checkpoint.write_bytes(b"")
    best.write_bytes(MAGIC)
    with pytest.raises(CheckpointError, match=r"no whole best.ckpt beside it"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("missing", ["pmd", "state_dict", "global_step", "RolloutDataModule"])
def test_a_file_in_which_something_is_missing_is_refused(checkpoint, missing):
    write_checkpoint(checkpoint, {key: value for key, value in state().items() if key != missing})
    with pytest.raises(CheckpointError, match=rf"is not pmd's: it lacks {missing}"):
        read_checkpoint(checkpoint)


def test_another_format_names_the_version_that_wrote_it(checkpoint):
    write_checkpoint(checkpoint, state(pmd={"format": FORMAT + 1, "version": "9.1"}))
    with pytest.raises(CheckpointError, match=rf"format={FORMAT + 1} and was written by pmd 9.1"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("place", ["weight", "optimizer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_never_replace_a_checkpoint(checkpoint, place, value):
    before, bad = checkpoint.read_bytes(), state()
    if place == "weight":
        bad["state_dict"]["weight"][2, 3] = value
    else:
        bad["optimizer_states"][0]["state"][0]["exp_avg"][0, 0] = value
    with pytest.raises(CheckpointError, match=r"not finite; the last good one, .*last.ckpt, is kept"):
        write_checkpoint(checkpoint, bad)
    assert checkpoint.read_bytes() == before


def test_the_best_score_of_a_callback_may_be_infinite(checkpoint):
    callbacks = {"EarlyStopping": {"best_score": torch.tensor(torch.inf), "wait_count": 0}}
    write_checkpoint(checkpoint, state(callbacks=callbacks))
    assert read_checkpoint(checkpoint)["callbacks"] == callbacks


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"callbacks": {"memory": {}, "Mine": {"best": np.float64(1)}}}, r"callbacks\.Mine holds numpy"),
        ({"theirs": Path("x")}, "theirs holds pathlib"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(checkpoint, changes, said):
    before = checkpoint.read_bytes()
    with pytest.raises(CheckpointError, match=f"because {said}.*last.ckpt, is kept.*plain values only"):
        write_checkpoint(checkpoint, state(**changes))
    assert checkpoint.read_bytes() == before


def test_an_interrupt_leaves_the_old_file_and_no_other(checkpoint, monkeypatch):
    before = checkpoint.read_bytes()
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), DiskError)):
        monkeypatch.setattr(os, "fsync", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(raised):
            write_checkpoint(checkpoint, state())
        assert checkpoint.read_bytes() == before
        assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)"):
        read_checkpoint(tmp_path)
