"""Watch a run from anywhere its folder can be read: `python launch/watch.py run=runs/NAME`."""

import sys

from selfsight.watching import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
