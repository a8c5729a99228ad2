"""Texts that requests bring."""

from __future__ import annotations

from raytier.errors import InvalidRequestError


def encodable(text: str, param: str) -> str:
    """`text`, refused where it holds half of a surrogate pair, which tokenizers cannot take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{param} holds a lone surrogate (U+{ord(text[error.start]):04X}), which is no character", param=param
        ) from None
    return text
