"""What machines can do, from their makers' data sheets, and what share of it training has reached.

Shares (`conv`, `transformer`) are executed operations over the dense peak in half precision, from
published runs: V100 from SEER (RegNetY-256GF, 512 GPUs, 6.125 s for 8,704 images: 12.4 % counting
what is computed twice) and DINO (ViT-S/16: 9 %); A100 from DINOv2 (ViT-L: 45 %); H100 from DINOv3
(ViT-L: 24 %). No RegNet run on A100 or later was published: those shares are estimates.
"""

from dataclasses import dataclass

import torch

from selfsight.config import ConfigError, nearest


@dataclass(frozen=True)
class Hardware:
    """One device, and what lies between devices.

    Attributes:
        memory: bytes.
        flops: dense operations a second in half precision (two a multiply-add).
        conv, transformer: share of these that training reaches.
        network: bytes a second of one device to other nodes, where nothing else is said.
        published: whether the shares come from a published run.
    """

    name: str
    memory: float
    flops: float
    conv: float
    transformer: float
    network: float
    published: bool = False


GB = 1e9
GIB = 2**30
KNOWN = {
    "v100_16gb": Hardware("V100 16 GB", 16 * GIB, 125e12, 0.12, 0.09, 3 * GB, True),
    "v100_32gb": Hardware("V100 32 GB", 32 * GIB, 125e12, 0.12, 0.09, 3 * GB, True),
    "a100_40gb": Hardware("A100 40 GB", 40 * GIB, 312e12, 0.25, 0.45, 25 * GB),
    "a100_80gb": Hardware("A100 80 GB", 80 * GIB, 312e12, 0.25, 0.45, 25 * GB),
    "h100_80gb": Hardware("H100 80 GB", 80 * GIB, 989e12, 0.20, 0.24, 50 * GB),
    "h200_141gb": Hardware("H200 141 GB", 139 * GIB, 989e12, 0.22, 0.25, 50 * GB),
    "l4_24gb": Hardware("L4 24 GB", 22 * GIB, 121e12, 0.25, 0.35, 3 * GB),
    "rtx3090_24gb": Hardware("RTX 3090 24 GB", 24 * GIB, 71e12, 0.30, 0.40, 3 * GB),
    "rtx4090_24gb": Hardware("RTX 4090 24 GB", 24 * GIB, 165e12, 0.25, 0.35, 3 * GB),
}
CPU_FLOPS = 5e10  # of one core, in fp32; only until it is measured


def hardware(name: str, cores: int, memory: float | None) -> Hardware:
    """The device named, or for `auto` the one of this machine.

    Raises:
        ConfigError: it is not known.
    """
    if name == "auto" and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        words = found.name.lower()
        like = next((k for k in KNOWN if k.partition("_")[0].removeprefix("rtx") in words), None)
        base = KNOWN[like or "a100_40gb"]
        return Hardware(
            found.name, found.total_memory, base.flops, base.conv, base.transformer, base.network
        )
    if name in ("auto", "cpu"):
        words = f"{cores} CPU cores"
        return Hardware(words, memory or 16 * GB, CPU_FLOPS * cores, 0.5, 0.5, 1.25 * GB)
    if name not in KNOWN:
        raise ConfigError(
            f"plan.device={name} is not known{nearest(name, [*KNOWN, 'cpu', 'auto'])}"
        )
    return KNOWN[name]
