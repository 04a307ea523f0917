"""What a job tells: a bar while it runs, `report.json`, and a table at the end."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

REPORT = "report.json"
REPEATED = ("repeated URL", "repeated image")  # neither saved nor failed
EVERY = 60.0  # seconds between two lines where there is no terminal


def make_report(totals: dict[str, Any], status: str) -> dict[str, Any]:
    """The content of report.json from the totals of the state.

    `seconds` and the rate are over all starts of the job; failures are of complete shards.
    """
    reasons = totals["reasons"]
    seconds = totals["seconds"]
    return {
        "status": status,
        "urls": totals["rows"],
        "saved": totals["saved"],
        "failed": sum(n for reason, n in reasons.items() if reason not in REPEATED),
        "repeated": {reason: reasons.get(reason, 0) for reason in REPEATED},
        "reasons": {reason: n for reason, n in reasons.items() if reason not in REPEATED},
        "hosts_with_most_failures": totals["hosts"],
        "shards": totals["shards"],
        "bytes": totals["bytes"],
        "seconds": seconds,
        "images_per_second": round(totals["saved"] / seconds, 2) if seconds else None,
        "bytes_per_second": round(totals["bytes"] / seconds) if seconds else None,
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json whole or not at all."""
    path = folder / (REPORT + ".part")
    path.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(path, folder / REPORT)  # noqa: PTH105 (over an older one, in one step)


def table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    urls = max(1, report["urls"])
    lines = [
        f"{report['status']}: {report['urls']:,} URLs in complete shards, {report['shards']:,} "
        f"shards, {report['bytes'] / 1e6:,.1f} MB, {report['seconds']:,.0f} s",
        f"  {'saved':<24}{report['saved']:>12,}{report['saved'] / urls:>8.1%}",
    ]
    counts = {**report["repeated"], **report["reasons"]}
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        if count:
            lines.append(f"  {reason:<24}{count:>12,}{count / urls:>8.1%}")
    if report["hosts_with_most_failures"]:
        lines.append("hosts with most failures")
        for host, count in list(report["hosts_with_most_failures"].items())[:10]:
            # Names come from strangers: nothing that a terminal would act on.
            shown = "".join(c if c.isprintable() else "?" for c in host)
            lines.append(f"  {shown:<36}{count:>8,}")
    return "\n".join(lines)


class Progress:
    """A bar on a terminal, a line a minute elsewhere, nothing when `show` is false."""

    def __init__(self, show: bool) -> None:
        self.outcomes: Counter[str] = Counter()
        self._bytes = 0
        self._last = time.monotonic()
        self._lines = show and not sys.stderr.isatty()
        self._bar = tqdm(unit=" URLs", disable=not show or self._lines, dynamic_ncols=True)

    def count(self, outcome: str, size: int = 0) -> None:
        """One URL is settled: "saved" with its bytes, or the reason why not."""
        self.outcomes[outcome] += 1
        self._bytes += size
        self._bar.update()
        now = time.monotonic()
        if not self._bar.disable and now - self._last > 0.5:
            self._last = now
            self._bar.set_postfix_str(self._state(), refresh=False)
        elif self._lines and now - self._last > EVERY:
            self._last = now
            print(f"{self.outcomes.total():,} URLs, {self._state()}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()

    def _state(self) -> str:
        return f"{self.outcomes['saved']:,} saved, {self._bytes / 1e6:,.0f} MB"
