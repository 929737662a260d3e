"""Checkpoints of which every rank writes a part: whole again on any number of ranks, replaced at once, checked."""

import shutil

import pytest
import torch
from rank_processes import on_ranks
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pmd.callbacks.checkpoint import VerifiedCheckpointIO
from pmd.checkpoint_file import FORMAT, read_checkpoint
from pmd.checkpoint_shards import divided, filled, write_divided
from pmd.errors import CheckpointError
from pmd.ranks import Ranks
from pmd.sharding import whole

#: Rows that two ranks cannot share evenly, a single one, and a tensor that is not divided.
TENSORS = {"head": torch.arange(15.0).view(5, 3), "norm": torch.tensor([0.5]), "adapter": torch.ones(2)}
TENSORS["embedding"] = TENSORS["head"]  # tied: one tensor with two names
LISTS = {name: tensor.tolist() for name, tensor in TENSORS.items()}


def state_of(tensors: dict[str, torch.Tensor]) -> dict:
    dicts = {key: {} for key in ("loops", "callbacks", "RolloutDataModule")}
    numbers = dict.fromkeys(("epoch", "global_step", "policy_version"), 3)
    moments = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": -tensors["head"]}}}
    lists = {"optimizer_states": [moments], "lr_schedulers": []}
    return {"pmd": {"format": FORMAT}, "state_dict": tensors} | dicts | numbers | lists


def shared_out(ranks: Ranks, scale: float = 1.0) -> dict[str, torch.Tensor]:
    mesh = ranks.mesh()
    scaled = {name: tensor * scale for name, tensor in TENSORS.items()}
    parts = {n: t if n == "adapter" else distribute_tensor(t, mesh, [Shard(0)]) for n, t in scaled.items()}
    return parts | {"embedding": parts["head"].detach()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which two ranks have written the same checkpoint twice."""
    folder = tmp_path_factory.mktemp("run")

    def act(ranks: Ranks):
        for scale in (9.0, 1.0):
            write_divided(folder / "last.ckpt", state_of(shared_out(ranks, scale)), ranks)
        with pytest.raises(CheckpointError, match=r"state_dict\.head holds values that are not finite"):
            write_divided(folder / "last.ckpt", state_of(shared_out(ranks, float("nan"))), ranks)
        own = shared_out(ranks, 0.0)
        like = {f"state_dict.{name}": tensor for name, tensor in own.items()}
        again = filled(read_checkpoint(folder / "last.ckpt"), like, ranks)["state_dict"]
        from_whole = divided(state_of(TENSORS), like)["state_dict"]
        assert isinstance(again["head"], DTensor)
        return [{name: whole(tensor).numpy() for name, tensor in found.items()} for found in (again, from_whole)]

    for found in on_ranks(2, folder, act):
        for tensors in found:
            assert {name: tensor.tolist() for name, tensor in tensors.items()} == LISTS
    return folder


def test_one_process_reads_whole_tensors(folder):
    state = read_checkpoint(folder / "last.ckpt")
    assert state["state_dict"]["head"].is_meta
    assert state["state_dict"]["head"].shape == (5, 3)
    state = filled(state, {}, None)
    torch.testing.assert_close(state["state_dict"], TENSORS, rtol=0, atol=0)
    moments = state["optimizer_states"][0]["state"][0]
    torch.testing.assert_close(moments["exp_avg"], -TENSORS["head"], rtol=0, atol=0)
    assert moments["step"] == 3


def test_the_folder_of_an_earlier_checkpoint_is_gone(folder):
    named = read_checkpoint(folder / "last.ckpt")["pmd"]["shards"]["folder"]
    assert [path.name for path in folder.glob("*.shards")] == [named]
    assert not list(folder.glob("*.part"))


def test_damage_is_found(folder):
    state = read_checkpoint(folder / "last.ckpt")
    file = next((folder / state["pmd"]["shards"]["folder"]).glob("shard-00002-*"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"shard-00002.*is missing or damaged"):
        filled(state, {}, None)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing or damaged"):
        filled(state, {}, None)
    file.write_bytes(data)


def test_a_run_that_goes_on_undivided_removes_the_folder(folder, tmp_path):
    """As soon as best.ckpt does not name it either."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "best.ckpt")
    for name, num_folders in (("last", 1), ("best", 0)):
        VerifiedCheckpointIO().save_checkpoint(state_of(TENSORS), tmp_path / f"{name}.ckpt")
        assert len(list(tmp_path.glob("*.shards"))) == num_folders
