"""How much memory a process and all below it use."""

import os
from pathlib import Path


def tree_memory(line: str = "Pss") -> int:
    """Bytes of this process and all below it, by a line of the kernel's smaps_rollup."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    total, waiting = 0, [os.getpid()]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        try:
            for text in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if text.startswith(f"{line}:"):
                    total += int(text.split()[1]) * 1024
        except OSError:
            pass
    return total
