"""Several agents for the eye: three of them and one Redis, calls sprayed over all, and one dies.

Starts Redis, the rating sandbox and three agents, sends each packet of twelve calls to an agent
chosen at random, kills one agent with -9 while they run, and prints who did what and what was
rated. What the killed agent was sent in its last second goes to another one, too.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo import (
    ACCOUNTS,
    DEADLINE,
    TRANSACTIONS,
    Program,
    address_of,
    graphql,
    print_table,
    running,
)

CALLS = 12
# Seconds. The lease is 5 s longer than the time-out of a request.
TIMEOUT = 1.0
CSEQS = {"INVITE": 1, "ACK": 1, "BYE": 2}


@contextmanager
def redis_server() -> Iterator[str]:
    """A Redis of its own on a free port, with each write on disk; its URL."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise SystemExit(
            "demo: no redis-server; make demo-cluster installs it on Debian and Ubuntu"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + DEADLINE
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise SystemExit("demo: Redis does not start") from None
                    time.sleep(0.05)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()
            process.wait(timeout=DEADLINE)


def sip(number: int, start: str, method: str, to_tag: bool = True) -> bytes:
    """A SIP message of a call between two accounts of the sandbox."""
    lines = [
        start,
        f"Via: SIP/2.0/UDP 192.0.2.1:5060;branch=z9hG4bK-{number}-{method}",
        f"From: <sip:2000@sip.canyan.io>;tag=from-{number}",
        "To: <sip:2001@sip.canyan.io>" + (f";tag=to-{number}" if to_tag else ""),
        f"Call-ID: demo-{number:02}",
        f"CSeq: {CSEQS[method]} {method}",
        "Content-Length: 0",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def hep(payload: bytes, at: float) -> bytes:
    """A HEP3 packet with a time stamp."""

    def chunk(kind: int, value: bytes) -> bytes:
        return bytes(2) + kind.to_bytes(2, "big") + (len(value) + 6).to_bytes(2, "big") + value

    seconds, micros = divmod(round(at * 1_000_000), 1_000_000)
    chunks = chunk(1, b"\2") + chunk(2, b"\x11") + chunk(3, b"\xc0\0\2\1") + chunk(4, b"\xc0\0\2\2")
    chunks += chunk(7, b"\x13\xc4") + chunk(8, b"\x13\xc4") + chunk(9, seconds.to_bytes(4, "big"))
    chunks += chunk(10, micros.to_bytes(4, "big")) + chunk(11, b"\1") + chunk(15, payload)
    return b"HEP3" + (len(chunks) + 6).to_bytes(2, "big") + chunks


def packets(base: float) -> list[tuple[float, bytes]]:
    """All packets with their seconds: a call each half second, each of 3 to 10 s."""
    found = []
    callee = "sip:2001@192.0.2.2"
    for number in range(CALLS):
        start = number / 2
        end = start + 3 + 7 * (number % 4) / 3
        steps = [
            (start, sip(number, f"INVITE {callee} SIP/2.0", "INVITE", False)),
            (start + 0.1, sip(number, "SIP/2.0 180 Ringing", "INVITE")),
            (start + 0.5, sip(number, "SIP/2.0 200 OK", "INVITE")),
            (start + 0.6, sip(number, f"ACK {callee} SIP/2.0", "ACK")),
            (end, sip(number, f"BYE {callee} SIP/2.0", "BYE")),
            (end + 0.1, sip(number, "SIP/2.0 200 OK", "BYE")),
        ]
        found += [(at, hep(payload, base + at)) for at, payload in steps]
    return sorted(found)


def spray(agents: list[Program]) -> None:
    """Send the packets at their times, each to any agent; the last agent is killed after 4 s."""
    addresses = [address_of(agent, "udp").rsplit(":", 1) for agent in agents]
    places = [(host, int(port)) for host, port in addresses]
    sock, began, killed = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), time.time(), False
    sent: list[tuple[float, int, bytes]] = []
    for at, data in packets(began):
        time.sleep(max(began + at - time.time(), 0))
        if at > 4 and not killed:
            killed = True
            agents[-1].kill()
            print(f"after 4 s: agent {len(agents)} is killed; its calls go on at the others")
            places.pop()
            again = [old for when, to, old in sent if to == len(places) and when > at - 1]
            for old in again:
                sock.sendto(old, random.choice(places))
        to = random.randrange(len(places))
        sock.sendto(data, places[to])
        sent.append((at, to, data))


def demo() -> None:
    """Start, spray, kill, print."""
    with ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        sandbox = stack.enter_context(
            running("scripts/rating_sandbox.py", "--listen", "127.0.0.1:0")
        )
        url = sandbox.wait_for(1, "listening on")[0].rpartition(" ")[2]
        graphql(url, ACCOUNTS)
        options = ["--listen-udp=127.0.0.1:0", "--listen-tcp=127.0.0.1:0", f"--cluster-url={redis}"]
        options += [f"--rating-api-url={url}", f"--rating-api-timeout={TIMEOUT:g}"]
        options += ["--sip-local-domains=sip.canyan.io"]
        agents = [stack.enter_context(running("rating_agent_hep.py", *options)) for _ in range(3)]
        for agent in agents:
            agent.wait_for(1, '"shards_taken"')
        print(f"Redis on {redis}, rating sandbox on {url}, three agents")
        print(f"{CALLS} calls, each packet to an agent chosen at random")
        spray(agents)
        deadline = time.monotonic() + 2 * DEADLINE
        while len(rows := graphql(url, TRANSACTIONS)["allTransactions"]) < 2 * CALLS:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        print("\nwhat the agents said:")
        for number, agent in enumerate(agents, 1):
            said = [json.loads(line) for line in agent.lines]
            told = [line["event"] for line in said]
            shards = [line["shards"] for line in said if line["event"] == "shards_taken"]
            print(
                f"  agent {number}: took {' and then '.join(map(str, shards))} shards, "
                f"{told.count('call_begin')} calls begun, {told.count('call_end')} ended"
            )
        print("\nrated transactions, two for each call:")
        print_table(rows)
    if len(rows) != 2 * CALLS:
        raise SystemExit(f"demo: {len(rows)} transactions, {2 * CALLS} were expected")


if __name__ == "__main__":
    demo()
