"""D5: what a transfer moves and where to, what it holds meanwhile and afterwards, and models that go during one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from raytier.actors.device import Move, MoveResult
from raytier.actors.transfers import ParameterMover, TransferManager
from raytier.codecs.forms import FORMS
from raytier.codecs.scheme import Scheme
from raytier.errors import InvalidRequestError, ParameterNotFoundError, ResourceNotAvailableError, TierError
from raytier.planner.plan import FILE_TIERS, Tier, TierSchemes
from raytier.tiers.transfers import Transfer, TransferCounts, TransferState
from tests.planner.models import llama

MANIFEST = llama(layers=3, tied=True)
UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


class Room:
    """A place that notes who holds it."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self.held: set[str] = set()
        self.error: Exception | None = None

    def obtain(self, names: Iterable[str]) -> Move:
        wanted = tuple(names)
        assert not self.held & set(wanted), "a second room for the same parameter"
        if self.error is not None:
            raise self.error
        self.held |= set(wanted)
        return Move(wanted, self.tier)

    def give_back(self, names: Sequence[str] | None = None) -> None:
        assert names is not None and self.held >= set(names)
        self.held -= set(names)
        if self.error is not None:
            raise self.error


class Node:
    """A device that does as it is told, unless `error` says otherwise, and places around it."""

    def __init__(
        self,
        kind: Any = "cpu",
        nvme_copies: bool = True,
        schemes: TierSchemes | None = None,
        file_tiers: Sequence[Tier] = FILE_TIERS,
    ) -> None:
        self.rooms = {tier: Room(tier) for tier in (Tier.HOST, Tier.RAMDISK, Tier.NVME)}
        if not nvme_copies:
            del self.rooms[Tier.NVME]
        self.error: Exception | None = None
        self.orders: list[Move] = []
        self.gate = threading.Event()
        self.gate.set()
        tiers = dict.fromkeys((p.name for p in MANIFEST.parameters), Tier.DEVICE)
        self.roundings = 0
        self.mover = ParameterMover(
            "m",
            MANIFEST,
            tiers,
            self._send,
            self.rooms,
            schemes=schemes or TierSchemes(),
            on_rounding=self._note_rounding,
            file_tiers=file_tiers,
            kind=kind,
        )

    def _note_rounding(self) -> None:
        self.roundings += 1

    def _send(self, order: Move) -> MoveResult:
        assert self.gate.wait(30)
        self.orders.append(order)
        if self.error is not None:
            raise self.error
        return MoveResult(
            sum(MANIFEST.by_name[name].nbytes for name in order.names),
            0.5,
            {name: self.mover.tier_of[name] for name in order.names},
        )

    def check(self) -> None:
        """Every parameter has its room in its own tier, and nowhere else."""
        for tier, room in self.rooms.items():
            assert room.held == {name for name, where in self.mover.tier_of.items() if where is tier}


def test_what_moves_gives_back_its_old_room() -> None:
    node = Node()
    for tier in (Tier.HOST, Tier.RAMDISK, Tier.NVME, Tier.HOST, Tier.DEVICE, Tier.NVME, Tier.RAMDISK, Tier.DEVICE):
        source = node.mover.tier_of[UP]
        result = node.mover.move([UP, DOWN], tier)
        assert result.sources == {UP: source, DOWN: source}
        assert node.mover.tier_of[UP] is tier
        node.check()
    assert len(node.orders) == 8


def test_only_what_is_elsewhere_moves() -> None:
    node = Node()
    node.mover.move([UP], Tier.HOST)
    assert node.mover.move([UP], Tier.HOST) == MoveResult(0, 0.0, {})
    assert node.mover.move([UP, DOWN], Tier.HOST).sources == {DOWN: Tier.DEVICE}
    assert [order.names for order in node.orders] == [(UP,), (DOWN,)]
    node.check()


def test_who_computes_with_rounded_weights_hears_of_it() -> None:
    """KV of other weights must not be found again: forms that lose nothing of this dtype change none."""
    dtype = MANIFEST.by_name[UP].dtype
    schemes = {
        Tier.HOST: {
            UP: Scheme(FORMS["bf16-coded"]),
            DOWN: Scheme(next(form for form in FORMS.values() if form.dtype == dtype)),
        },
        Tier.RAMDISK: {UP: Scheme(FORMS["int8"])},
        Tier.NVME: {UP: Scheme(FORMS["int8"]), DOWN: Scheme(FORMS["int4-64"])},
    }
    node = Node(schemes=TierSchemes(schemes))
    steps = [([UP, DOWN], Tier.HOST, 0), ([UP], Tier.RAMDISK, 1), ([UP], Tier.NVME, 1), ([UP, DOWN], Tier.NVME, 2)]
    for names, tier, roundings in [*steps, ([UP], Tier.DEVICE, 3), ([DOWN], Tier.NVME, 3), ([DOWN], Tier.DEVICE, 4)]:
        node.mover.move(names, tier)
        assert node.roundings == roundings, (names, tier)
    node.error = TierError("the disk is full")
    with pytest.raises(TierError):
        node.mover.move([UP], Tier.NVME)
    assert node.roundings == 4


def test_the_checkpoint_read_in_place_needs_no_room() -> None:
    node = Node(nvme_copies=False)
    node.mover.move([UP], Tier.NVME)
    assert node.orders[-1] == Move((UP,), Tier.NVME)
    node.mover.move([UP], Tier.HOST)
    node.check()


def test_a_move_that_fails_holds_nothing() -> None:
    node = Node()
    node.mover.move([DOWN], Tier.HOST)
    node.error = ResourceNotAvailableError("the device is full")
    for names, tier in (([UP, DOWN], Tier.RAMDISK), ([DOWN], Tier.DEVICE), ([UP], Tier.HOST)):
        with pytest.raises(ResourceNotAvailableError, match="is full"):
            node.mover.move(names, tier)
        node.check()
    node.error, node.rooms[Tier.NVME].error = None, TierError("the disk is full")
    with pytest.raises(TierError, match="the disk is full"):
        node.mover.move([UP], Tier.NVME)
    node.check()
    assert node.mover.tier_of[UP] is Tier.DEVICE


def test_room_that_cannot_be_given_back_fails_no_move() -> None:
    node = Node()
    node.mover.move([UP], Tier.HOST)
    node.rooms[Tier.HOST].error = TierError("its owner is gone")
    assert node.mover.move([UP], Tier.NVME).nbytes > 0
    assert node.mover.tier_of[UP] is Tier.NVME
    node.error = ZeroDivisionError("what really went wrong")
    node.rooms[Tier.RAMDISK].give_back = node.rooms[Tier.HOST].give_back  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        node.mover.move([DOWN], Tier.RAMDISK)


def test_targets() -> None:
    mover = Node().mover
    number = [p.name for p in MANIFEST.parameters].index(UP)
    assert mover.target(number) == mover.target(UP)
    assert mover.target(UP).names == (UP,)
    assert mover.target("lm_head.weight").names == (EMBEDDING,), "tied: one copy under two names"
    layer = mover.target(layer=0)
    assert layer.label == "layer 0"
    assert len(layer.names) == 7, "norms stay on the device"
    assert UP in layer.names
    assert mover.places_of(layer.names) == "device"
    mover.move([UP], Tier.NVME)
    assert mover.places_of(layer.names) == "device, nvme"
    assert mover.nbytes(Tier.NVME) == MANIFEST.by_name[UP].nbytes
    for wrong in (-1, len(MANIFEST.parameters), "layer 0", "", True):
        with pytest.raises(ParameterNotFoundError):
            mover.target(wrong)
    for number in (-1, 3):
        with pytest.raises(ParameterNotFoundError, match="layers 0 to 2"):
            mover.target(layer=number)
    for norm in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        with pytest.raises(InvalidRequestError, match="cannot leave the device"):
            mover.target(norm)
    for arguments in ({}, {"parameter": UP, "layer": 0}):
        with pytest.raises(InvalidRequestError, match="either"):
            mover.target(**arguments)


@pytest.mark.parametrize(
    ("kind", "text", "tier"),
    [
        ("cpu", "cpu", Tier.HOST),
        ("cpu", "host", Tier.HOST),
        ("cpu", "device:0", Tier.DEVICE),
        ("cpu", "device", Tier.DEVICE),
        ("cpu", " NVMe ", Tier.NVME),
        ("cpu", "ramdisk", Tier.RAMDISK),
        ("cuda", "cpu", Tier.HOST),
        ("cuda", "gpu", Tier.DEVICE),
        ("cuda", "gpu:0", Tier.DEVICE),
        ("cuda", "GPU:00", Tier.DEVICE),
        ("cuda", "device:0", Tier.DEVICE),
    ],
)
def test_destinations(kind: str, text: str, tier: Tier) -> None:
    assert Node(kind).mover.destination(text) is tier


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("cpu", "gpu:0", "there is no gpu:0; device:0 is the compute process"),
        ("cpu", "gpu", "there is no gpu"),
        ("cuda", "gpu:1", "gpu:0 alone"),
        ("cuda", "device:7", "device:0 alone"),
        ("cpu", "", "known: cpu or host, gpu:N"),
        ("cpu", "nvme:0", "no destination"),
        ("cpu", "device:-1", "no destination"),
        ("cpu", "disk", "no destination"),
    ],
)
def test_destinations_that_are_none(kind: str, text: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said) as refused:
        Node(kind).mover.destination(text)
    assert refused.value.param == "destination_device"


def test_tiers_that_are_not_in_use_are_no_destination() -> None:
    mover = Node(file_tiers=()).mover
    for tier in FILE_TIERS:
        with pytest.raises(InvalidRequestError, match=f"set tiers.{tier}.enabled"):
            mover.destination(tier)


@pytest.fixture
def manager() -> Iterator[TransferManager]:
    manager = TransferManager()
    yield manager
    manager.close("the test has ended")


def under_way(manager: TransferManager, transfer: Transfer) -> None:
    """Wait until a transfer is being worked on."""
    deadline = time.monotonic() + 30
    while manager.get(transfer.id).state is not TransferState.PROCESSING:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_transfers_run_by_priority_and_tell_their_end(manager: TransferManager) -> None:
    node, order = Node(), list[str]()
    manager.attach(node.mover)
    node.gate.clear()
    tell = lambda transfer: order.append(transfer.target)  # noqa: E731
    target, tier = node.mover.target, Tier.NVME
    first = manager.submit("m", target(layer=0), tier, 10, tell)
    under_way(manager, first)
    rest = [manager.submit("m", target(layer=n), tier, priority, tell) for n, priority in ((1, 5), (2, 1))]
    assert manager.counts() == TransferCounts(pending=2, processing=1, completed=0, failed=0, nbytes=0)
    node.gate.set()
    ended = [manager.future(each.id).result(30) for each in (first, *rest)]
    assert {each.state for each in ended} == {TransferState.COMPLETED}
    assert order == ["layer 0", "layer 2", "layer 1"]
    assert ended[0].nbytes == sum(MANIFEST.by_name[name].nbytes for name in target(layer=0).names)
    assert manager.get(first.id).seconds == 0.5
    node.check()


def test_a_model_that_goes_during_a_transfer(manager: TransferManager) -> None:
    """What waits fails at once, what is under way is waited for, what comes later fails too."""
    node = Node()
    manager.attach(node.mover)
    node.gate.clear()
    moving, waiting = (manager.submit("m", node.mover.target(layer=n), Tier.HOST) for n in (0, 1))
    under_way(manager, moving)
    manager.detach("m", "m was unloaded")
    assert manager.future(waiting.id).result(30).reason == "m was unloaded"
    settled = threading.Event()
    thread = threading.Thread(target=lambda: (manager.settle("m"), settled.set()))
    thread.start()
    assert not settled.wait(0.05)
    node.error = TierError("the model was unloaded while a transfer was under way")
    node.gate.set()
    thread.join(30)
    assert settled.is_set()
    assert "under way" in (manager.future(moving.id).result(30).reason or "")
    late = manager.submit("m", node.mover.target(layer=2), Tier.HOST)
    assert manager.future(late.id).result(30).reason == "m is not loaded any more"
    node.check()


def test_nothing_is_taken_after_the_end(manager: TransferManager) -> None:
    node = Node()
    manager.attach(node.mover)
    manager.close("the application is being stopped")
    with pytest.raises(ResourceNotAvailableError, match="is being stopped"):
        manager.submit("m", node.mover.target(layer=0), Tier.NVME)
