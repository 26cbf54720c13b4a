"""On the path of a Python process, this refuses every look outside the machine and writes it down.

The file is named by the variable ASKED; every line is a host and who asked.
"""

import os
import sys
import traceback

LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", None)


def host_of(event, arguments):
    """Who is to be reached, None for this machine and for other events."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None
    else:
        return None
    host = host.decode() if isinstance(host, bytes) else host
    return None if host in LOCAL else host


def refuse(event, arguments):
    """An audit hook: Python calls it before it acts."""
    host = host_of(event, arguments)
    if host is not None:
        frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack()[:-1]]
        with open(os.environ["ASKED"], "a", encoding="utf-8") as file:
            file.write(f"{host} by {' > '.join(frames[-6:])}\n")
        raise ConnectionRefusedError(f"{host} is outside this machine")


sys.addaudithook(refuse)
