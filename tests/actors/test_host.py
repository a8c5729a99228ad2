"""A3, D4, E6: the node's RAM pool: ranges by parameter, all or nothing, and memory that goes back when they do."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytier.actors.host import HostPoolActor
from raytier.errors import ResourceNotAvailableError
from raytier.tiers.arena import Arena

MIB = 1 << 20


def fill(sizes: Mapping[str, int], pool: HostPoolActor, model_id: str = "m") -> Arena:
    """Reserve, and write to every range as a device does."""
    grants = pool.reserve(model_id, sizes)
    arena = Arena.attach(next(iter(grants.values())).handle)
    for grant in grants.values():
        arena.view[grant.offset : grant.offset + grant.nbytes] = b"x" * grant.nbytes
    return arena


def test_grants_are_ranges_of_their_own_in_the_order_of_the_wish() -> None:
    pool = HostPoolActor("host", 10 * MIB)
    sizes = {"a": 5000, "b": 3 * MIB, "c": 1}
    grants = pool.reserve("m", sizes)
    assert list(grants) == ["a", "b", "c"]
    assert {name: grant.nbytes for name, grant in grants.items()} == sizes
    spans = sorted((grant.offset, grant.offset + grant.nbytes) for grant in grants.values())
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    assert all(grant.offset % 4096 == 0 for grant in grants.values())
    status = pool.status()
    assert (status.owners, status.ranges) == ({"m": 3 * MIB + 5001}, 3)
    assert status.free == status.largest_free == 10 * MIB - (3 * MIB + 8192 + 4096)


def test_a_budget_takes_memory_only_as_it_is_filled_and_gives_it_back() -> None:
    pool = HostPoolActor("host", 1 << 40)  # more than any machine that runs the tests has
    assert pool.status().touched == 0
    arena = fill({"a": 8 * MIB, "b": 4 * MIB}, pool)
    assert pool.status().touched == 12 * MIB
    assert pool.free("m", ["a"]) == 8 * MIB
    assert pool.status().touched == 4 * MIB
    assert pool.free("m", ["a", "never there"]) == 0, "freeing again changes nothing"
    arena.close()
    fill({"x": MIB}, pool, "other").close()
    assert pool.free("m") == 4 * MIB
    status = pool.status()
    assert (status.touched, status.owners) == (MIB, {"other": MIB})
    assert pool.free("m") == pool.free("nobody") == 0
    pool.free("other")
    assert pool.status().free == 1 << 40


def test_all_or_nothing_with_the_numbers() -> None:
    pool = HostPoolActor("host", 4 * 4096)
    pool.reserve("m", {"a": 4096, "b": 4096, "c": 4096})
    pool.free("m", ["b"])
    message = (
        r"2 parameters of n: they need 12288 bytes, the largest of them 8192; 8192 of 16384 are free, 4096 of them"
    )
    with pytest.raises(ResourceNotAvailableError, match=message + r".*tiers\.host\.max_mb"):
        pool.reserve("n", {"small": 100, "large": 5000})
    status = pool.status()
    assert (status.free, status.owners, status.ranges) == (8192, {"m": 8192}, 2)
    assert len(pool.reserve("n", {"small": 100, "other": 4096})) == 2


def test_the_large_ones_find_their_room_first() -> None:
    pool = HostPoolActor("host", 4 * 4096)
    pool.reserve("m", dict.fromkeys("abcd", 4096))
    pool.free("m", ["a", "b", "d"])  # a hole of two blocks in front of one of one
    assert len(pool.reserve("n", {"small": 4096, "large": 8192})) == 2


@pytest.mark.parametrize("sizes", [{"a": 1}, {"new": 1, "a": 1}])
def test_a_second_range_for_a_parameter_is_refused(sizes: dict[str, int]) -> None:
    pool = HostPoolActor("host", MIB)
    pool.reserve("m", {"a": 1})
    with pytest.raises(ValueError, match="m: a has a range of the host pool already"):
        pool.reserve("m", sizes)
    assert pool.status().ranges == 1
    assert pool.reserve("other", {"a": 1})


def test_nothing_is_no_range() -> None:
    pool = HostPoolActor("host", MIB)
    with pytest.raises(ValueError, match="b wants 0 bytes"):
        pool.reserve("m", {"a": 1, "b": 0})
    assert pool.status().ranges == 0
    assert pool.reserve("m", {}) == {}


@pytest.mark.parametrize("capacity", [0, 4095])
def test_a_pool_of_nothing_refuses_and_says_what_to_change(capacity: int) -> None:
    pool = HostPoolActor("host", capacity)
    with pytest.raises(ResourceNotAvailableError, match=r"7 bytes are wanted of a host pool of 0; raise tiers\.host"):
        pool.reserve("m", {"a": 7})
    assert pool.reserve("m", {}) == {}
    assert pool.free("m") == 0
    status = pool.status()
    assert (status.capacity, status.free, status.touched) == (0, 0, 0)
    assert repr(pool) == "HostPoolActor(0 MiB)"


def test_names_cannot_be_mistaken_for_each_other() -> None:
    pairs = [
        ("a/b", "c"),
        ("a", "b/c"),
        ("a' 'b", "c"),
        ("a", "b' 'c"),
        ("a b", "c"),
        ("a", "b c"),
        ("", ""),
        ("\0", "\ud800"),
    ]
    pool = HostPoolActor("host", MIB)
    for number, (model, name) in enumerate(pairs):
        pool.reserve(model, {name: number + 1})
    assert pool.status().ranges == len(pairs)
    for number, (model, name) in enumerate(pairs):
        assert pool.free(model, [name]) == number + 1


class PoolMachine(RuleBasedStateMachine):
    """Every grant keeps its bytes whatever else is granted and freed; what is freed leaves no page behind."""

    UNITS = 16

    def __init__(self) -> None:
        super().__init__()
        self.pool = HostPoolActor("host", self.UNITS * 4096)
        self.held: dict[tuple[str, str], tuple[int, int, int]] = {}  # -> offset, bytes, mark
        self.view: memoryview | None = None
        self.count = 0

    @rule(model=st.sampled_from("mn"), sizes=st.lists(st.integers(1, 5 * 4096), min_size=1, max_size=3))
    def reserve(self, model: str, sizes: list[int]) -> None:
        wanted = {f"p{self.count + number}": nbytes for number, nbytes in enumerate(sizes)}
        self.count += len(sizes)
        before = self.pool.status()
        try:
            grants = self.pool.reserve(model, wanted)
        except ResourceNotAvailableError:
            assert self.pool.status() == before
            return
        if self.view is None:
            self.view = Arena.attach(next(iter(grants.values())).handle).view
        for name, grant in grants.items():
            self.count += 1
            mark = self.count % 255 + 1
            assert not any(self.view[grant.offset : grant.offset + grant.nbytes]), "a new range reads as zeros"
            self.view[grant.offset : grant.offset + grant.nbytes] = bytes([mark]) * grant.nbytes
            self.held[model, name] = grant.offset, grant.nbytes, mark

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free_one(self, data: st.DataObject) -> None:
        model, name = data.draw(st.sampled_from(sorted(self.held)))
        assert self.pool.free(model, [name]) == self.held.pop((model, name))[1]

    @rule(model=st.sampled_from("mn"))
    def free_all(self, model: str) -> None:
        gone = [key for key in self.held if key[0] == model]
        assert self.pool.free(model) == sum(self.held.pop(key)[1] for key in gone)

    @invariant()
    def agrees(self) -> None:
        status = self.pool.status()
        taken = sum(-(-nbytes // 4096) * 4096 for _, nbytes, _ in self.held.values())
        assert status.free == self.UNITS * 4096 - taken
        assert status.touched == taken
        assert status.ranges == len(self.held)
        for offset, nbytes, mark in self.held.values():
            assert self.view is not None
            assert self.view[offset : offset + nbytes] == bytes([mark]) * nbytes


PoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
test_pool_matches_its_model = PoolMachine.TestCase
