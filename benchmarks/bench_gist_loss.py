"""gist_loss: forward and backward against its peers; shapes in cases.py, peers in peers.py."""

from __future__ import annotations

OP = "gist_loss"


def test_gist_loss(timed, case, direction, provider):
    timed(OP, case, direction, provider)
