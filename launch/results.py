"""One table over runs: `python launch/results.py runs/* [--form md|csv|html] [--out FILE]`.

Published numbers stand beside where evaluator and data are the same. `--study` shows what the runs
of a multirun ended with instead. As html, a page: also what differs between the runs, and their
curves overlaid.
"""

import argparse
import sys
from pathlib import Path

from selfsight.evals.table import collect, html_table, render, study
from selfsight.report.compare import comparison
from selfsight.report.record import read


def _compared(folders: list[Path], form: str) -> str:
    """The table; as a page, with the runs' states, differences and curves where they are runs."""
    runs = [folder for folder in folders if (folder / "config.yaml").is_file()]
    if form != "html" or not runs:
        return render(collect(folders), form)
    try:
        table = html_table(collect(folders))
    except ValueError:  # none was evaluated
        table = ""
    return comparison([read(folder) for folder in runs], table)


def main() -> int:
    parser = argparse.ArgumentParser(description="One table over runs and checkpoints.")
    parser.add_argument("folders", nargs="+", type=Path, help="runs, or folders of results")
    parser.add_argument("--form", choices=("md", "csv", "html"), help="by default that of --out")
    parser.add_argument("--out", type=Path, help="a file; by default the console")
    parser.add_argument("--study", action="store_true", help="summaries of the runs")
    asked = parser.parse_args()
    form = asked.form or (asked.out.suffix[1:] if asked.out else "md")
    if form not in ("md", "csv", "html"):
        print(f"selfsight: {asked.out} should end in .md, .csv or .html", file=sys.stderr)
        return 2
    folders = [folder for folder in asked.folders if folder.is_dir()]
    try:
        text = study(folders) if asked.study else _compared(folders, form)
    except ValueError as error:
        print(f"selfsight: {error}", file=sys.stderr)
        return 2
    if asked.out is None:
        print(text, end="")
    else:
        asked.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
