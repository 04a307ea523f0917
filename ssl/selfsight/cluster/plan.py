"""How many machines a job needs, from its batch alone; knows neither torch nor SLURM."""

from dataclasses import dataclass

from omegaconf import DictConfig

from selfsight.config import ConfigError, divisors_text

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Plan:
    """`processes` on `nodes` machines, `per_node` on each; on GPUs, one GPU a process."""

    nodes: int
    per_node: int
    gpus: bool

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        what = "GPU" if self.gpus else "process"
        many = {"GPU": "GPUs", "process": "processes"}
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{nodes} x {self.per_node} {what if self.per_node == 1 else many[what]}"


def plan(config: DictConfig) -> Plan:
    """The machines of a job.

    `cluster.processes` and `cluster.nodes` say so; otherwise processes are what fills the nodes
    given, or as many GPUs as `gpus` says (one process on CPU), and nodes as many as they fill.

    Raises:
        ConfigError: it does not come out even; what would is named.
    """
    c = config.cluster
    gpus = config.device != "cpu"
    full = (GPUS_PER_NODE if c.gpus_per_node is None else c.gpus_per_node) if gpus else None
    if full is not None and full < 1:
        raise ConfigError(f"cluster.gpus_per_node={full} must be at least 1")
    for key in ("processes", "nodes"):
        if c[key] is not None and c[key] < 1:
            raise ConfigError(f"cluster.{key}={c[key]} must be at least 1")
    processes, nodes = c.processes, c.nodes
    if processes is None:
        processes = (nodes or 1) * (full or 1) if nodes or full is None else int(config.gpus)
    if nodes is None:
        nodes = -(-processes // full) if full else 1
    name = "GPUs" if gpus else "processes"
    if processes % nodes:
        lower = processes // nodes * nodes
        raise ConfigError(
            f"{processes} {name} do not spread evenly over {nodes} nodes: "
            f"set cluster.processes={lower or nodes} or {lower + nodes}, or cluster.nodes"
        )
    if full and processes // nodes > full:
        raise ConfigError(
            f"{processes} GPUs on {nodes} nodes are {processes // nodes} a node, and one has "
            f"{full}: set cluster.nodes={-(-processes // full)}, or cluster.gpus_per_node"
        )
    if config.batch_size % processes:
        raise ConfigError(
            f"batch_size={config.batch_size} does not divide over {processes} processes; "
            f"{divisors_text(config.batch_size, processes)}"
        )
    own, part = config.batch_size // processes, config.images_per_device
    if part is not None and part < own and own % part:
        raise ConfigError(
            f"the {own} images of a process (batch_size={config.batch_size} over {processes}) do "
            f"not divide into images_per_device={part}; {divisors_text(own, part)}"
        )
    return Plan(nodes, processes // nodes, gpus)
