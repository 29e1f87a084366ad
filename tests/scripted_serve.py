"""The real command line and HTTP process around an engine of the tests.

python tests/scripted_serve.py "scripted_engine.py [flags of the engine]" serve [flags]
"""

import shlex
import sys
from pathlib import Path

from eaglerun.server.cli import main

if __name__ == "__main__":
    script, *flags = shlex.split(sys.argv[1])
    engine = [sys.executable, str(Path(__file__).parent / script), *flags]
    sys.exit(main(sys.argv[2:], engine))
