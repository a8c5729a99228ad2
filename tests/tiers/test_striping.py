"""A3: which byte of a parameter lies where in which file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytier.checkpoint.manifest import Extent
from raytier.tiers.aligned import ALIGNMENT
from raytier.tiers.striping import file_sizes, slice_extents, stripe_extents


def test_stripes_go_round() -> None:
    extents = stripe_extents(5 * 4096 + 7, 2, 8192)
    assert extents == (Extent(0, 0, 8192), Extent(1, 0, 8192), Extent(0, 8192, 4103))
    assert file_sizes(extents) == (16384, 8192)


def test_what_is_no_larger_than_a_stripe_stays_whole() -> None:
    assert stripe_extents(8192, 3, 8192) == (Extent(0, 0, 8192),)
    assert stripe_extents(100_000, 1, 8192) == (Extent(0, 0, 100_000),)
    assert stripe_extents(0, 3, 8192) == ()
    assert file_sizes(()) == ()


@pytest.mark.parametrize(("nbytes", "files", "stripe"), [(-1, 1, 4096), (1, 0, 4096), (1, 1, 0), (1, 2, 5000)])
def test_nonsense_is_refused(nbytes: int, files: int, stripe: int) -> None:
    with pytest.raises(ValueError, match="stripes of"):
        stripe_extents(nbytes, files, stripe)


@given(nbytes=st.integers(1, 1 << 20), files=st.integers(1, 6), blocks=st.integers(1, 40))
def test_stripes_hold_every_byte_once_aligned_and_in_balance(nbytes: int, files: int, blocks: int) -> None:
    stripe = blocks * ALIGNMENT
    extents = stripe_extents(nbytes, files, stripe)
    assert sum(extent.nbytes for extent in extents) == nbytes
    assert all(extent.offset % ALIGNMENT == 0 for extent in extents)
    assert all(extent.nbytes % ALIGNMENT == 0 for extent in extents[:-1])
    assert len({extent.file for extent in extents}) == min(files, -(-nbytes // stripe))
    sizes = file_sizes(extents)
    assert all(size and size % ALIGNMENT == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= stripe
    for file, size in enumerate(sizes):  # one behind the other, without a gap
        position = 0
        for extent in (e for e in extents if e.file == file):
            assert extent.offset == position
            position += extent.nbytes
        assert 0 <= size - position < ALIGNMENT


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=8), data=st.data())
def test_a_slice_is_the_slice_of_the_whole(lengths: list[int], data: st.DataObject) -> None:
    extents, whole = [], []
    for number, nbytes in enumerate(lengths):
        extents.append(Extent(number % 3, number * 1000, nbytes))
        whole += [(number % 3, number * 1000 + byte) for byte in range(nbytes)]
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    parts = list(slice_extents(extents, start, stop))
    assert all(part.nbytes for part in parts)
    assert [(p.file, p.offset + byte) for p in parts for byte in range(p.nbytes)] == whole[start:stop]
