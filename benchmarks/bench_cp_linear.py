"""cp_linear: forward and backward against its peers; shapes in cases.py, peers in peers.py."""

from __future__ import annotations

OP = "cp_linear"


def test_cp_linear(timed, case, direction, provider):
    timed(OP, case, direction, provider)
