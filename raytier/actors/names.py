"""Names under which actors appear in the Ray dashboard and in `ray list actors`."""

from __future__ import annotations

NAMESPACE = "raytier"


def actor_name(app: str, role: str, index: int = 0) -> str:
    """`raytier:{app}:{role}:{index}`."""
    return f"raytier:{app}:{role}:{index}"
