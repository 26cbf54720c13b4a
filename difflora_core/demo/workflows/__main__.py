"""`make workflows`: runs every file in workflows/ in ComfyUI's real front end."""

import sys

from .runner import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
