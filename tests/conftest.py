"""Paths, and gevent's patches before any test imports a socket."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import rating_agent_hep  # noqa: F401
