"""One table over runs: `python launch/results.py runs/* [--form md|csv|html] [--out FILE]`.

Published numbers stand beside where evaluator and data are the same. `--study` shows what the runs
of a multirun ended with instead.
"""

import argparse
import sys
from pathlib import Path

from selfsight.evals.table import collect, render, study


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
        text = study(folders) if asked.study else render(collect(folders), form)
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
