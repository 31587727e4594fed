"""HEALTHCHECK of the Docker image: does the agent serve, and is it well?

With `listen_status` it is asked for `/healthz`, which minds APIs and the journal, too. (An
orchestrator that restarts what is unhealthy wins nothing by it while an API is down, and loses
nothing where there is a journal.) Without it, TCP is asked by a connect; with `listen_tcp` off,
Linux is asked whether somebody has the UDP port. Reads the environment, not a configuration file.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException
from pathlib import Path

TIMEOUT = 3.0  # seconds; the connect is local
PREFIX = "RATING_AGENT_HEP_"


def healthy(environ: Mapping[str, str], proc: Path = Path("/proc/net")) -> bool:
    """Whether the agent with these settings is well. True where all listeners are off."""
    host, port = local(environ.get(f"{PREFIX}LISTEN_STATUS", ""))
    if port:
        return asked(host, int(port))
    host, port = local(environ.get(f"{PREFIX}LISTEN_TCP", ":9060"))
    if port:
        try:
            socket.create_connection((host, int(port)), TIMEOUT).close()
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


def local(address: str) -> tuple[str, str]:
    """Host and port to ask for a listener; an address that means all is asked at loopback."""
    host, _, port = address.rpartition(":")
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(
        host, host.strip("[]")
    ), port


def asked(host: str, port: int) -> bool:
    """What /healthz says; its reasons are printed, for `docker inspect` shows them."""
    connection = HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        print(answer.read(4096).decode("utf-8", "replace").strip())
    except (OSError, HTTPException) as error:
        print(f"no answer: {error}")
        return False
    finally:
        connection.close()
    return answer.status == 200


if __name__ == "__main__":
    sys.exit(0 if healthy(os.environ) else 1)
