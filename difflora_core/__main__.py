"""`python -m difflora_core`: the command line, see commands/."""

import sys

from .commands.main import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
