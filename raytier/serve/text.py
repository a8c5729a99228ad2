"""Texts on their way into JSON."""

from __future__ import annotations

_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def on_one_line(json_text: str) -> str:
    """JSON without Unicode's line and paragraph separators, which are escaped: clients that cut an event stream with
    a Unicode-aware `splitlines` (httpx's `aiter_lines`) would break inside a string."""
    if "\u2028" in json_text or "\u2029" in json_text or "\x85" in json_text:
        return json_text.translate(_LINE_BREAKS)
    return json_text
