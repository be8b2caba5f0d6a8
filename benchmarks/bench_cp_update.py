"""cp_update: forward and backward against its peers; shapes in cases.py, peers in peers.py."""

from __future__ import annotations

OP = "cp_update"


def test_cp_update(timed, case, direction, provider):
    timed(OP, case, direction, provider)
