"""gelu: forward and backward against its peers; shapes in cases.py, peers in peers.py."""

from __future__ import annotations

OP = "gelu"


def test_gelu(timed, case, direction, provider):
    timed(OP, case, direction, provider)
