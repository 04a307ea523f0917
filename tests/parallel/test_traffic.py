"""What crosses the network, and when the host waits for the device: counted, against the formula at
the top of `parallelize.py`."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfsight.distributed.env import World
from selfsight.distributed.parallelize import parallelize
from tests.parallel.ranks import on_ranks
from tests.parallel.training import METHODS, make_optimizer, update

pytestmark = pytest.mark.slow  # minutes

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "item")
KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class Traffic(TorchDispatchMode):
    """Counts collectives and their bytes (of the whole tensor), and reads by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = KINDS.get(func._schema.name.rpartition("::")[2])
        if func.namespace in ("c10d", "_c10d_functional") and kind:
            tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
            sizes = [t.numel() * t.element_size() for t in tensors]
            self.calls[kind] += 1
            self.bytes[kind] += max(sizes)
        result = func(*args, **(kwargs or {}))
        # DDP keeps an int32 table of the parameters in use in host memory, whatever the device
        if any(word in str(func) for word in READS) and args[0].dtype != torch.int32:
            self.reads.append(str(func))
        return result


def _one_step(world: World, kind: str, options: dict) -> dict:
    """What a step was counted to do, and what the formula says."""
    method = METHODS[kind]()
    plain = {id(m): list(m.parameters()) for m in method.modules()}
    heads = [method.head, *method.prototypes]
    outside = [p for m in heads for p in plain[id(m)]]
    blocks = [p for m in method.trunk.units() for p in plain[id(m)]]
    known = {id(p) for p in (*outside, *blocks)}
    rest = [p for p in method.parameters() if id(p) not in known]
    elements = {
        name: sum(_padded(p, world.size) for p in parameters)
        for name, parameters in (("moved", [*outside, *blocks]), ("rest", rest))
    }
    parameters = list(method.parameters())
    exact, tensors = sum(p.numel() for p in parameters), len(parameters)
    groups = len(method.trunk.units()) + len(heads)
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    repeated = [m for unit in method.trunk.units() for m in unit.modules() if m in set(norms)]

    module = parallelize(
        method, units=method.trunk.units(), world=world, syncbn_group_size=world.size, **options
    )
    optimizer = make_optimizer(method, "lars")
    update(module, optimizer, world, 0)
    with Traffic() as traffic:
        update(module, optimizer, world, 2)

    # the formula: two crop sizes; three iterations of Sinkhorn on 2 x 20 values; the flag of bad
    # numbers, and the loss, which the loop adds up for its log lines only
    channels: dict[nn.Module, int] = {m: int(m.weight.shape[0]) for m in norms}
    forward = [channels[m] for m in norms]
    if options.get("activation_checkpointing") == "all":
        forward += [channels[m] for m in repeated]
    calls = {"all_reduce": 2 * (len(forward) + len(norms)) + 3 + 1 + 1}
    size = {
        "all_reduce": 2 * sum(8 * (2 * c + 1) for c in forward)
        + 2 * sum(8 * channels[m] for m in norms)
        + 3 * 4 * 2 * 20
        + 4
        + 4
    }
    if options["strategy"] == "fsdp":
        scale = 2 if options.get("compress_gradients") else 4
        calls["all_reduce"] += 2  # norms of the gradients to clip by, and those of LARS
        size["all_reduce"] += 3 * 8 * tensors
        calls |= {"all_gather": 4 * groups + 3, "reduce_scatter": groups + 1}
        size["all_gather"] = 4 * (4 * elements["moved"] + 3 * elements["rest"])
        size["reduce_scatter"] = scale * (elements["moved"] + elements["rest"])
    else:
        calls["all_reduce"] += 1  # one bucket holds so small a method
        size["all_reduce"] += exact * (2 if options.get("compress_gradients") else 4)
    return {
        "found": [dict(traffic.calls), dict(traffic.bytes)],
        "expected": [calls, size],
        "reads": traffic.reads,
    }


def _padded(parameter: Tensor, ranks: int) -> int:
    """Elements that travel: rows are filled up to a multiple of the ranks."""
    rows = -(-parameter.shape[0] // ranks) * ranks
    return rows * (parameter.numel() // parameter.shape[0])


@pytest.mark.parametrize("kind", ["regnet", "vit"])
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "ddp"},
        {"strategy": "ddp", "compress_gradients": "bf16", "activation_checkpointing": "all"},
        {"strategy": "ddp", "activation_checkpointing": "selective"},
        {"strategy": "fsdp"},
        {"strategy": "fsdp", "compress_gradients": "bf16", "activation_checkpointing": "all"},
    ],
    ids=["ddp", "ddp-bf16-all", "ddp-selective", "fsdp", "fsdp-bf16-all"],
)
def test_collectives_and_bytes_equal_the_formula_and_the_host_reads_nothing(kind, options):
    for rank in on_ranks(2, _one_step, kind, options):
        assert rank["found"] == rank["expected"]
        assert rank["reads"] == []
