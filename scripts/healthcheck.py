"""HEALTHCHECK of the Docker image: does the agent accept what it is told to listen for?

TCP is asked by a connect; with `listen_tcp` off, Linux is asked whether somebody has the UDP port.
The agent is the container's first process, so that its end ends the container: only an agent that
runs and serves nothing has to be found here. Reads the environment only, not a configuration file.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

TIMEOUT = 3.0  # seconds; the connect is local
PREFIX = "RATING_AGENT_HEP_"


def healthy(environ: Mapping[str, str], proc: Path = Path("/proc/net")) -> bool:
    """Whether the agent with these settings listens. True where both listeners are off."""
    host, _, port = environ.get(f"{PREFIX}LISTEN_TCP", ":9060").rpartition(":")
    if port:
        try:
            socket.create_connection((host.strip("[]") or "127.0.0.1", int(port)), TIMEOUT).close()
        except OSError:
            return False
        return True
    port = environ.get(f"{PREFIX}LISTEN_UDP", ":9060").rpartition(":")[2]
    return not port or any(
        int(line.split()[1].rpartition(":")[2], 16) == int(port)
        for table in ("udp", "udp6")
        if (proc / table).exists()
        for line in (proc / table).read_text(encoding="ascii").splitlines()[1:]
    )


if __name__ == "__main__":
    sys.exit(0 if healthy(os.environ) else 1)
