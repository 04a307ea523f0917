"""Run a function on several gloo ranks of this machine, each a process of its own.

The ranks are forked from a server that has imported torch and done nothing else, so that a rank
starts in a fraction of a second and inherits no thread.
"""

import io
import multiprocessing
import os
import queue
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from selfsight.distributed import collectives, env

SECONDS = 90.0
# What a rank would import otherwise, some of it as late as in its first backward pass.
PRELOADED = [
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.utils.checkpoint",
    "torchvision",
]


def on_ranks(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    local_size: int = 0,
    seconds: float = SECONDS,
) -> list:
    """`[function(world, *arguments) for each rank]`, in the order of ranks.

    Every process is ended before this returns or raises; the first error of a rank is raised with
    its traceback.

    Args:
        size: number of ranks.
        function: called as `function(world, *arguments)` in each rank; from a module's top level.
            It returns tensors, plain values, or lists and dicts of them.
        local_size: ranks on one (pretended) node; 0 for all.
        seconds: until ranks that are not done are an error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    address = f"tcp://127.0.0.1:{env.free_port()}"
    ranks = [
        context.Process(
            target=_rank,
            args=(rank, size, local_size or size, address, results, function, arguments),
            daemon=True,
        )
        for rank in range(size)
    ]
    found: dict[int, Any] = {}
    deadline = time.monotonic() + seconds
    try:
        for process in ranks:
            process.start()
        while len(found) < size:
            gone = [r for r in range(size) if r not in found and ranks[r].exitcode is not None]
            try:
                rank, value, error = results.get(timeout=0.2)
            except queue.Empty:
                if gone:
                    codes = [ranks[r].exitcode for r in gone]
                    raise AssertionError(f"ranks {gone} ended with {codes}") from None
                if time.monotonic() > deadline:
                    missing = [r for r in range(size) if r not in found]
                    raise AssertionError(f"ranks {missing} were not done in {seconds} s") from None
                continue
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            found[rank] = torch.load(io.BytesIO(value), weights_only=True)
        for process in ranks:
            process.join(5)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()
        results.close()
    return [found[rank] for rank in range(size)]


def _rank(rank, size, local_size, address, results, function, arguments) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    place = {"local_rank": rank % local_size, "local_size": local_size}
    try:
        world = env.join(rank, size, **place, address=address, timeout=60)
        data = io.BytesIO()
        torch.save(function(world, *arguments), data)
        collectives.barrier()  # rank 0 keeps the store that the others may still need
        env.leave()
        results.put((rank, data.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
        os._exit(1)  # a rank that failed between collectives cannot leave the group in order
