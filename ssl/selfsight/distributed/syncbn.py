"""BatchNorm whose batch is that of a group of ranks, on CPU and GPU.

Forward: each rank measures its images' mean and centred sum of squares in one stable pass. One
all-reduce adds (count, count * mean, centred sum + count * mean^2) in float64, where the last
subtraction loses nothing that float32 statistics have. Backward: one all-reduce of (sum of dy, sum
of dy * (x - mean)), the two sums of Ioffe and Szegedy (2015, https://arxiv.org/abs/1502.03167).

Differences from `torch.nn.SyncBatchNorm`: it takes CPU tensors; an all-reduce of O(channels) in
place of an all-gather of O(ranks * channels); no synchronisation with the host; running statistics
can be frozen in training mode (`frozen_running_statistics`). Its own GPU kernels are used here too.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from selfsight.distributed.collectives import Group
from selfsight.distributed.env import World

CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SharedGroup:
    """A process group that survives `copy.deepcopy` of the module that holds it; None: this rank
    alone, which exchanges nothing."""

    def __init__(self, group: Group | None):
        self.group = group

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the group. It is one functional operation, which torch.compile
        takes into its graph, and whose result selective checkpointing can keep."""
        if self.group is None or self.group.size() == 1:
            return tensor
        operations = torch.ops._c10d_functional
        reduced = operations.all_reduce(tensor.contiguous(), "sum", self.group.group_name)
        return operations.wait_tensor(reduced)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedGroup":
        return self


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the images (b, channels, ...) of all ranks of `group` (None: the world).

    Parameters, buffers and their names are those of `torch.nn.BatchNorm2d`; so is evaluation mode.
    Statistics are float32, also for half-precision images, and float64 for float64. The ranks may
    hold different numbers of images, even none. The gradients of weight and bias are this rank's
    share, which DDP averages like any other.
    """

    group: SharedGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  (torch's name)
        if input.dim() < 2:
            raise ValueError(
                f"BatchNorm takes (b, channels, ...), and not {input.dim()}-d tensors."
            )

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """(b, channels, ...) normalised: over the group in training, by running averages else."""
        self._check_input_dim(input)
        if not self.training:
            return self._by_running_averages(input)
        group = self.group or SharedGroup(_world())
        with torch.no_grad():
            mean, variance, count = _statistics(input, group)
            if self.track_running_stats:
                self._track(mean, variance, count)
        result = _Normalize.apply(
            input, self.weight, self.bias, mean, variance, count, self.eps, group
        )
        assert isinstance(result, Tensor)
        return result

    def _by_running_averages(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight is not None and weight.dtype != x.dtype and self.running_mean is not None:
            # FSDP2 gathers weights in half precision, which torch's kernels do not mix
            weight, bias = (t.to(self.running_mean.dtype) for t in (weight, bias))
        return functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            weight,
            bias,
            self.running_mean is None,
            0.0,
            self.eps,
        )

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1).clamp_(min=1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), momentum)


def fitting_group_size(size: int, world: World) -> int:
    """The number of ranks that share BatchNorm's statistics when groups of `size` are asked for.

    Groups are contiguous ranks: parts of a node that divide it, or whole nodes that divide the
    world; a world smaller than `size` is one group.

    Raises:
        ValueError: a group would cross nodes unevenly; it names the sizes that fit.
    """
    if size >= world.size:
        return world.size
    fitting = [
        n
        for n in range(1, world.size + 1)
        if (world.local_size % n == 0 if n <= world.local_size else n % world.local_size == 0)
        and world.size % n == 0
    ]
    if size not in fitting:
        raise ValueError(
            f"BatchNorm groups of {size} ranks do not fit {world.size} ranks on nodes of "
            f"{world.local_size}; sizes that fit are {', '.join(map(str, fitting))}."
        )
    return size


def convert(module: nn.Module, group_size: int, world: World, *, alone: bool = False) -> int:
    """Make each BatchNorm of `module` synchronise over contiguous groups of ranks, in place.

    Every rank must call it, in the same order. Groups of one rank leave the module as it is, unless
    `alone` asks for this class, whose statistics are float32 whatever the weights are.

    Returns:
        The number of ranks in a group: see `fitting_group_size`, also for the error raised.
    """
    group_size = fitting_group_size(group_size, world)
    layers = {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm)}
    for name, layer in layers.items():
        if type(layer) not in (*CONVERTED, SyncBatchNorm):
            raise ValueError(
                f"{name} is a {type(layer).__name__}, of which no synchronised form exists; build "
                "the model from torch.nn.BatchNorm2d or train it without BatchNorm groups."
            )
    if not layers or (group_size == 1 and not alone):
        return group_size
    group = SharedGroup(None)
    for first in range(0, world.size, group_size) if group_size > 1 else ():
        ranks = range(first, first + group_size)
        new = dist.new_group(list(ranks))  # every rank makes every group
        if world.rank in ranks:
            assert isinstance(new, dist.ProcessGroup)
            group = SharedGroup(new)
    for layer in layers.values():
        # A change of class keeps parameters, hooks, and the references that others hold.
        layer.__class__ = SyncBatchNorm
        assert isinstance(layer, SyncBatchNorm)
        layer.group = group
    return group_size


class _Normalize(torch.autograd.Function):
    """(x - mean) * invstd * weight + bias; its gradient is the one through mean and invstd too."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, mean, variance, count, eps, group) -> Tensor:
        invstd = (variance + eps).rsqrt_()
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.group = group
        if x.numel() == 0:
            return torch.empty_like(x)
        if weight is not None:
            weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
        if x.is_cuda:
            return torch.batch_norm_elemt(_dense(x), weight, bias, mean, invstd, eps)
        return functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, invstd, count = ctx.saved_tensors
        factor = None if weight is None else weight.to(mean.dtype)
        sum_dy, sum_dy_xmu = _gradient_sums(dy, x, mean, invstd, factor)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = sum_dy_xmu * invstd
        if ctx.needs_input_grad[2]:
            grad_bias = sum_dy
        if ctx.needs_input_grad[0]:
            sum_dy, sum_dy_xmu = ctx.group.sum(torch.stack([sum_dy, sum_dy_xmu]))
            grad_x = _input_gradient(dy, x, mean, invstd, factor, sum_dy, sum_dy_xmu, count)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _statistics(x: Tensor, group: SharedGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (channels), biased variance (channels) and count (1) over the group's images."""
    channels = x.shape[1]
    count = x.numel() // channels if channels else 0
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if count == 0:
        mean = variance = torch.zeros(channels, dtype=torch.float64, device=x.device)
    elif x.is_cuda:
        tiny = torch.finfo(torch.float32).tiny  # the kernel gives 1 / sqrt(variance + tiny)
        mean, invstd = torch.batch_norm_stats(_dense(x), tiny)
        mean, variance = mean.double(), invstd.double().pow_(-2)
    else:
        variance, mean = torch.var_mean(x.to(dtype), _dims(x), correction=0)
        mean, variance = mean.double(), variance.double()
    squares = torch.addcmul(variance, mean, mean)
    packed = torch.cat([mean, squares, mean.new_ones(1)]).mul_(count)
    packed = group.sum(packed)
    mean, squares = (packed[:-1] / packed[-1:]).chunk(2)
    variance = torch.addcmul(squares, mean, mean, value=-1).clamp_(min=0)
    return mean.to(dtype), variance.to(dtype), packed[-1:].to(dtype)


def _gradient_sums(dy, x, mean, invstd, weight) -> tuple[Tensor, Tensor]:
    """This rank's sum of dy and of dy * (x - mean), each (channels)."""
    if x.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    if x.is_cuda:
        sums = torch.batch_norm_backward_reduce(
            _dense(dy), _dense(x), mean, invstd, weight, True, False, False
        )
        return sums[0], sums[1]
    dy, centred = dy.to(mean.dtype), x.to(mean.dtype) - _wide(mean, x)
    return dy.sum(_dims(x)), (dy * centred).sum(_dims(x))


def _input_gradient(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count) -> Tensor:
    """invstd * weight * (dy - mean of dy - (x - mean) * invstd^2 * mean of dy * (x - mean))."""
    if x.numel() == 0:
        return torch.empty_like(x)
    if x.is_cuda:
        return torch.batch_norm_backward_elemt(
            _dense(dy), _dense(x), mean, invstd, weight, sum_dy, sum_dy_xmu, count.int()
        )
    scale = invstd if weight is None else invstd * weight
    slope = _wide(sum_dy_xmu / count * invstd.square(), x)
    centred = x.to(mean.dtype) - _wide(mean, x)
    gradient = dy.to(mean.dtype) - _wide(sum_dy / count, x) - centred * slope
    return (gradient * _wide(scale, x)).to(x.dtype)


def _world() -> Group | None:
    return dist.group.WORLD if dist.is_initialized() else None


def _dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _wide(channels: Tensor, x: Tensor) -> Tensor:
    return channels.view(1, -1, *[1] * (x.dim() - 2))


def _dense(x: Tensor) -> Tensor:
    """What torch's GPU kernels take: channels-last as it is, everything else contiguous."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()
