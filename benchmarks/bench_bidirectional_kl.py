"""bidirectional_kl: forward and backward against its peers; shapes in cases.py, peers in peers.py."""

from __future__ import annotations

OP = "bidirectional_kl"


def test_bidirectional_kl(timed, case, direction, provider):
    timed(OP, case, direction, provider)
