"""topk_kl: forward and backward against its peers; shapes in cases.py, peers in peers.py."""

from __future__ import annotations

OP = "topk_kl"


def test_topk_kl(timed, case, direction, provider):
    timed(OP, case, direction, provider)
