"""F2: what a block's hash covers."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from raytier.kv.hashing import block_hash, extend_hashes, root_hash

ROOT = root_hash(model="m", dtype="float32", layout="l", block_size=4)
tokens = st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=24)


def hashes(ids: list[int], root: bytes = ROOT) -> list[bytes]:
    found: list[bytes] = []
    extend_hashes(found, root, ids, 4, len(ids) // 4)
    return found


@given(tokens, tokens)
def test_a_hash_stands_for_the_whole_prefix(first: list[int], second: list[int]) -> None:
    for index, (one, other) in enumerate(zip(hashes(first), hashes(second), strict=False)):
        assert (one == other) == (first[: 4 * index + 4] == second[: 4 * index + 4])


@given(tokens, st.integers(0, 5))
def test_growing_is_the_same_as_hashing_at_once(ids: list[int], already: int) -> None:
    grown = hashes(ids)[:already]
    extend_hashes(grown, ROOT, ids, 4, len(ids) // 4)
    assert grown == hashes(ids)


def test_everything_that_changes_kv_changes_the_root() -> None:
    base = {"model": "m", "dtype": "float32", "layout": "l", "adapter": "", "salt": ""}
    roots = {root_hash(block_size=4, **base), root_hash(block_size=8, **base)}
    roots |= {root_hash(block_size=4, **(base | {name: "x"})) for name in base}
    roots.add(root_hash(block_size=4, **(base | {"model": "", "adapter": "m"})))
    assert len(roots) == 8


def test_no_other_process_hashes_otherwise() -> None:
    code = (
        "from raytier.kv.hashing import *;"
        "print(block_hash(root_hash(model='m', dtype='float32', layout='l', block_size=4), [1, 2, 3, 70000]).hex())"
    )
    for seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == block_hash(ROOT, [1, 2, 3, 70000]).hex()
