"""GPT-2's alphabet, in which byte-level tokenizers spell their tokens: one character per byte."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


def bytes_of(token: str) -> bytes:
    """The bytes that a token stands for."""
    alphabet = _byte_of()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:
        return token.encode()  # an added token, spelled out
