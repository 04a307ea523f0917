"""Look at what a trunk sees: `python launch/visualize.py run=runs/NAME image=PATH`."""

import sys


def visualize(arguments: list[str]) -> int:
    # torch is imported from here on: nothing heavy where Python only reads this file
    from selfsight.visualize.command import main

    return main(arguments)


if __name__ == "__main__":
    sys.exit(visualize(sys.argv[1:]))
