"""Tensors that are cut over ranks: who writes what, and any layout read into any other one."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from selfsight.distributed import checkpoint, checkpoint_folder, payload
from selfsight.distributed.async_save import Saver
from selfsight.distributed.checkpoint_parts import part_of, to_write
from tests.parallel.ranks import on_ranks

LANES, WIDTH = 12, 5


def _queue() -> torch.Tensor:
    """Every number is its own place; (2, lanes, width), cut by lane."""
    return torch.arange(2 * LANES * WIDTH, dtype=torch.float32).reshape(2, LANES, WIDTH)


def _wholes() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {
        "uneven": torch.randn(7, 3),
        "one_row": torch.randn(1, 4).bfloat16(),
        "column": torch.randn(4, 9).t(),
        "repeated": torch.randn(40),
        "plain": torch.randn(6, 6),
        "count": torch.tensor(5),
        "nothing": torch.zeros(2, 0, 3),
        "empty_cut": torch.zeros(0, 3),
        "mask": torch.arange(11) % 3 == 0,
    }


def _laid_out(wholes: dict[str, torch.Tensor], queue: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors as a rank of this world holds them."""
    if not dist.is_initialized():
        return {**wholes, "queue": queue}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cut = {"uneven": 0, "one_row": 0, "column": 1, "mask": 0, "empty_cut": 0}
    tensors = dict(wholes)
    for name, dim in cut.items():
        tensors[name] = distribute_tensor(wholes[name], mesh, [Shard(dim)])
    tensors["repeated"] = distribute_tensor(wholes["repeated"], mesh, [Replicate()])
    own = queue.chunk(dist.get_world_size(), 1)[dist.get_rank()].clone()
    tensors["queue"] = DTensor.from_local(own, mesh, [Shard(1)])
    return tensors


def _save_and_load(world, folder: str, step: int, expected: str | None) -> list[str]:
    """Load what another world left, compare it, and save it again from here."""
    wholes = _wholes()
    if expected is not None:
        blank = {name: torch.zeros_like(tensor) for name, tensor in wholes.items()}
        tensors = _laid_out(blank, torch.zeros_like(_queue()))
        manifest = checkpoint.load_into(tensors, expected)
        assert manifest["scalars"] == {"lr": 0.5}
        mine = _laid_out(wholes, _queue())
        for name, tensor in tensors.items():
            local, right = (part_of(name, t, world.size) for t in (tensor, mine[name]))
            assert local and right
            assert torch.equal(local.local, right.local), name
            assert local.local.dtype == right.local.dtype
    else:
        tensors = _laid_out(wholes, _queue())
    saver = Saver(folder, world)
    assert saver.save(step, tensors, {"lr": 0.5}, config_hash="abc")
    assert saver.finish()
    return sorted(to_write(tensors, world.rank, world.size)[0])


def test_a_queue_that_differs_by_rank_goes_through_worlds_of_2_1_3_and_2(tmp_path):
    from_before = None
    for step, size in enumerate((2, 1, 3, 2)):
        written = on_ranks(size, _save_and_load, str(tmp_path), step, from_before)
        path = checkpoint.latest(tmp_path)
        assert path is not None
        assert path.name == f"step_{step:08d}"
        assert len(checkpoint.verify(path)["files"]) == size
        tensors, manifest = checkpoint.load(path)
        assert manifest["world_size"] == size
        expected = {**_wholes(), "queue": _queue()}
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name
            assert tensors[name].dtype == tensor.dtype
        # what is the same on all ranks is written once
        for name in ("repeated", "plain", "count", "nothing", "empty_cut", "one_row"):
            assert sum(name in names for names in written) == 1, name
        assert all("queue" in names for names in written)
        from_before = str(path)


def _by_two_meshes(world, folder: str) -> list[str]:
    """Rows cut along one dimension of the mesh and repeated along the other, and cut along both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    rows, both = torch.randn(5, 4), torch.randn(7, 2)
    tensors = {
        "hybrid": distribute_tensor(rows, mesh, [Replicate(), Shard(0)]),
        "more": distribute_tensor(rows + 1, mesh, [Replicate(), Shard(0)]),
        "both": distribute_tensor(both, mesh, [Shard(0), Shard(0)]),
        "sides": distribute_tensor(both, mesh, [Shard(1), Shard(0)]),
    }
    saver = Saver(folder, world)
    saver.save(1, tensors, {}, config_hash="")
    assert saver.finish()
    blank = {name: tensor.clone().zero_() for name, tensor in tensors.items()}
    checkpoint.load_into(blank, checkpoint_folder.place_of(Path(folder), 1), checked=True)
    for name, tensor in tensors.items():
        found = blank[name]
        assert isinstance(tensor, DTensor) and isinstance(found, DTensor)
        assert torch.equal(found.to_local(), tensor.to_local()), name
    return sorted(to_write(tensors, world.rank, world.size)[0])


def test_hybrid_meshes(tmp_path):
    written = on_ranks(4, _by_two_meshes, str(tmp_path))
    tensors, _ = checkpoint.load(checkpoint.checkpoints(tmp_path)[-1])
    torch.manual_seed(0)
    rows, both = torch.randn(5, 4), torch.randn(7, 2)
    expected = {"hybrid": rows, "more": rows + 1, "both": both, "sides": both}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert sum("hybrid" in names for names in written) == 2  # two parts, one writer each
    assert all(("hybrid" in names) != ("more" in names) for names in written)  # shared out


def _fsdp(world, folder: str, step: int, before: str | None) -> dict[str, torch.Tensor]:
    """Two updates of a sharded model and its momentum, after what `before` holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    if world.size > 1:
        mesh = init_device_mesh("cpu", (world.size,))
        for unit in (model[0], model[2], model):
            fully_shard(unit, mesh=mesh)
        assert isinstance(model, FSDPModule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def update(seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model.eval()(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()

    def tensors() -> dict[str, torch.Tensor]:
        momentum = {
            f"momentum/{name}": optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in model.named_parameters()
        }
        return {**model.state_dict(), **momentum}

    update(0)  # the momentum is there from now on
    if before:
        checkpoint.load_into(tensors(), before)
    for seed in range(step, step + 2):
        update(seed)
    saver = Saver(folder, world)
    saver.save(step + 2, tensors(), {}, config_hash="")
    assert saver.finish()
    return {}


def test_fsdp2_weights_and_momentum_move_between_worlds(tmp_path):
    """The same updates in worlds of 2, 3 and 1 as in one process."""
    many, one = tmp_path / "many", tmp_path / "one"
    before: dict[Path, str | None] = {many: None, one: None}
    for step, size in ((1, 2), (3, 3), (5, 1)):
        for folder, ranks in ((many, size), (one, 1)):
            on_ranks(ranks, _fsdp, str(folder), step, before[folder])
            before[folder] = str(checkpoint.latest(folder))
    found, _ = checkpoint.load(str(before[many]))
    expected, _ = checkpoint.load(str(before[one]))
    assert found.keys() == expected.keys()
    assert len(found) == 15
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def _sums(world) -> dict:
    mesh = init_device_mesh("cpu", (world.size,))
    with pytest.raises(ValueError, match=r"tensor x is placed as .*P.*, which cannot be stored"):
        part_of("x", DTensor.from_local(torch.ones(2), mesh, [Partial()]), world.size)
    shard = DTensor.from_local(torch.ones(2), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="saved by all ranks"):
        checkpoint.save(".", 1, {"x": shard}, {}, config_hash="")
    return {}


def test_partial_sums_and_lone_shards_are_refused(tmp_path):
    on_ranks(2, _sums)


def test_the_ranks_share_what_is_the_same_on_all():
    tensors = {f"t{n}": torch.zeros(100 + n) for n in range(40)} | {"big": torch.zeros(1000)}
    shares = [to_write(tensors, rank, 4)[0] for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    sizes = [sum(tensor.numel() for tensor in share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 140


def _rewrite(path: Path, name: str, tensors, parts) -> None:
    """Alter a file and the manifest with it, as somebody could who wants to mislead."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    written = payload.write_tensors(path / name, tensors, parts)
    manifest["files"][name] = {"size": written.size, "sha256": written.sha256}
    (path / checkpoint.MANIFEST).write_bytes(checkpoint_folder.manifest_text(manifest))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"x": [[4, 3], [1, 0]]}, "lacks a part of x"),
        ({"x": [[2, 3], [1, 0]]}, "part of another x"),
        ({"x": [[2, 3], [-1, 0]]}, "part of another x"),
        ({"x": [[2], [0]]}, "cannot be read"),
        ({"x": 7}, "cannot be read"),
        ([], "cannot be read"),
        ("x", "cannot be read"),
    ],
)
def test_parts_that_make_no_whole_are_refused(tmp_path, parts, said):
    path = checkpoint.save(tmp_path, 1, {"x": torch.ones(2, 3)}, {}, config_hash="")
    _rewrite(path, "state-00000.safetensors", {"x": torch.ones(2, 3)}, {"parts": json.dumps(parts)})
    with pytest.raises(checkpoint.CheckpointError, match=said):
        checkpoint.load(path)


def test_a_part_that_two_files_have_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"x": torch.ones(2, 3)}, {}, config_hash="")
    half = {"parts": json.dumps({"x": [[4, 3], [2, 0]]})}
    for name in ("state-00000.safetensors", "state-00001.safetensors"):
        _rewrite(path, name, {"x": torch.ones(2, 3)}, half)
    with pytest.raises(checkpoint.CheckpointError, match="in two files"):
        checkpoint.load(path)


def test_one_tensor_at_a_time(tmp_path):
    path = checkpoint.save(tmp_path, 1, _wholes(), {}, config_hash="")
    with checkpoint.Reader(path) as reader:
        assert reader.shapes["uneven"] == (7, 3)
        assert torch.equal(reader.read("uneven"), _wholes()["uneven"])
