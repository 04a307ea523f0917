"""Which version of the code this is. Imports nothing heavy: submitting a job asks too."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]


def commit(root: Path = ROOT) -> str | None:
    """The checkout's commit, with `+changes` if files differ from it; None outside git.

    A job that runs a copy of the code, which is no checkout, is told its commit when it starts.
    """
    if told := os.environ.get("SELFSIGHT_COMMIT"):
        return told
    try:
        head, changes = (
            subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if changes else "")
