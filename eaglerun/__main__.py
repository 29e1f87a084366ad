"""python -m eaglerun: the command line."""

import sys

from eaglerun.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
