"""A real redis-server for the tests, on a port of its own, as the distribution has it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

import harness

PROGRAM = next(filter(None, map(shutil.which, ("redis-server", "valkey-server"))), "")
needs_redis = pytest.mark.skipif(not PROGRAM, reason="no redis-server: make redis-server")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class RedisServer:
    """Starts in `folder` with options such as `appendonly yes`; `start` after `stop` again."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.port = free_port()
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        command = [
            PROGRAM,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(self.folder),
        ]
        command += ["--save", "", "--logfile", str(self.folder / "redis.log")]
        # Else the port of `cluster-enabled` is 10,000 above, which there may not be.
        command += ["--cluster-port", str(free_port())]
        for option in self.options:
            name, _, value = option.partition(" ")
            command += [f"--{name}", *value.split(" ")]
        self.process = subprocess.Popen(command)
        harness.wait_until(self._answers, "Redis answers")

    def _answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, "Redis has ended"
        try:
            return self.ask("PING") in ("+PONG", "-NOAUTH Authentication required.")
        except OSError:
            return False

    def ask(self, *words: str | bytes) -> str:
        """The first line of the answer to a command, as Redis writes it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
            file = sock.makefile("rwb")
            file.write(b"*%d\r\n" % len(words))
            for word in words:
                octets = word.encode() if isinstance(word, str) else word
                file.write(b"$%d\r\n%s\r\n" % (len(octets), octets))
            file.flush()
            line = file.readline().decode().strip()
            if line[:1] == "$" and line != "$-1":
                return file.read(int(line[1:])).decode("utf-8", "replace")
            return line

    def add(self, stream: str, number: str, frame: bytes) -> None:
        """Append an entry with a number of the caller's choice."""
        answer = self.ask("XADD", stream, number, "f", frame)
        assert answer == number, answer

    def kill(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def stop(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
