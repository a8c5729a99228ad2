"""Under which names KV blocks are found: hashes of everything that their content follows from.

A block's hash covers the hash of the block before it, so that it stands for the whole prefix, and its own tokens. The
first one's parent is the `root_hash` of the model, the form of its KV, and a salt. 128 bits of BLAKE2b: prompts come
from people who do not know each other, so nobody may be able to make two that collide; a block of 16 tokens costs 0.6
us, 0.3 more than with a hash for which somebody could. Nothing depends on the process (PYTHONHASHSEED), so what lies on
a disk is found by the next one.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from hashlib import blake2b

_BYTES = 16


def root_hash(*, model: str, dtype: str, layout: str, block_size: int, adapter: str = "", salt: str = "") -> bytes:
    """Parent of the first block of a sequence.

    Args:
        model: what weights and configuration are identified by.
        dtype: of keys and values. layout: of the bytes of a block, over all layers.
        adapter: what else changes the model's computation.
        salt: sequences share blocks only with those of the same salt.
    """
    fields = [model, dtype, layout, block_size, adapter, salt]
    return blake2b(json.dumps(fields).encode(), digest_size=_BYTES, person=b"raytier kv root").digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Of a full block that holds `tokens`, behind the block of the hash `parent`."""
    return blake2b(parent + array("I", tokens).tobytes(), digest_size=_BYTES).digest()


def extend_hashes(hashes: list[bytes], root: bytes, tokens: Sequence[int], block_size: int, blocks: int) -> None:
    """Append to `hashes`, those of the leading blocks of `tokens`, until there are `blocks`."""
    parent = hashes[-1] if hashes else root
    for index in range(len(hashes), blocks):
        parent = block_hash(parent, tokens[index * block_size : (index + 1) * block_size])
        hashes.append(parent)
