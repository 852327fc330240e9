"""A recorded case, for tests to change."""

from __future__ import annotations

CASE = {
    "id": "x",
    "family": "llada",
    "mode": "dual",
    "prompt": [[1, 2, 3]],
    "gen_length": 8,
    "block_length": 4,
    "threshold": 0.9,
}
