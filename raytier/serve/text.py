"""Texts on their way in and out of JSON."""

from __future__ import annotations

from raytier.errors import InvalidRequestError

_LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def on_one_line(json_text: str) -> str:
    """JSON without Unicode's line and paragraph separators, which are escaped: clients that cut an event stream with
    a Unicode-aware `splitlines` (httpx's `aiter_lines`) would break inside a string."""
    if "\u2028" in json_text or "\u2029" in json_text or "\x85" in json_text:
        return json_text.translate(_LINE_BREAKS)
    return json_text


def encodable(text: str, param: str) -> str:
    """`text`, refused where it holds half of a surrogate pair, which tokenizers cannot take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{param} holds a lone surrogate (U+{ord(text[error.start]):04X}), which is no character", param=param
        ) from None
    return text
