"""The real command line and HTTP process around the scripted engine.

python tests/scripted_serve.py "FLAGS OF THE ENGINE" serve [flags of the server]
"""

import shlex
import sys
from pathlib import Path

from eaglerun.server.cli import main

ENGINE = (sys.executable, str(Path(__file__).parent / "scripted_engine.py"))

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], engine=[*ENGINE, *shlex.split(sys.argv[1])]))
