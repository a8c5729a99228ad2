"""E7, H6: which model is loaded, who may change it, and what becomes of requests meanwhile."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from raytier.catalog.control import ModelControl
from raytier.errors import (
    BudgetError,
    CheckpointError,
    ConflictError,
    DamagedError,
    ModelNotFoundError,
    QueueFullError,
)
from raytier.serve.handles import generate
from tests.serve.conftest import MakeServed
from tests.serve.echo import MODEL, Served


@pytest.fixture
def unloaded(make_served: MakeServed) -> Served:
    return make_served(max_queue=2)


async def test_load_and_unload_again_and_again(unloaded: Served) -> None:
    control = unloaded.control
    assert (control.state(), control.running()) == ("no_model_loaded", None)
    for count in range(1, 4):
        assert "is being loaded" in control.load("/models/llama" if count % 2 else MODEL)
        assert (await generate(await unloaded.model(None), "one two")).text == "one two"
        await unloaded.eventually(lambda: control.state() == "loaded")
        assert await control.unload(None) == f"{MODEL} is unloaded"
        assert (control.state(), control.running(), unloaded.node.model) == ("no_model_loaded", None, None)
        assert unloaded.node.loads == count
    await asyncio.sleep(0.05)
    assert control.error() is None, "what waited for the end of loading does not count"


async def test_loads_of_one_model_are_one_load(unloaded: Served) -> None:
    control, node = unloaded.control, unloaded.node
    node.load_gate.clear()
    control.load(None)
    assert control.load(MODEL) == f"{MODEL} is being loaded already"
    with pytest.raises(ConflictError, match="is being loaded"):
        await control.unload(None)
    node.load_gate.set()
    await unloaded.eventually(lambda: control.state() == "loaded")
    assert control.load(MODEL) == f"{MODEL} is loaded already"
    assert node.loads == 1


async def test_other_models_are_not_found(unloaded: Served) -> None:
    for name in ("other", "/models/other", ""):
        with pytest.raises(ModelNotFoundError, match=f"served are: {MODEL}"):
            unloaded.control.load(name)
        with pytest.raises(ModelNotFoundError, match=f"served are: {MODEL}"):
            await unloaded.control.loaded(name)
        with pytest.raises(ModelNotFoundError, match=f"served are: {MODEL}"):
            await unloaded.control.unload(name)
    assert unloaded.node.loads == 0


async def test_without_a_model_it_is_said_how_to_load_one(unloaded: Served) -> None:
    with pytest.raises(ConflictError, match=r'not loaded; .* POST /api/models/load with {"model_name_or_path": "org'):
        await unloaded.control.loaded(None)
    with pytest.raises(ConflictError, match="is not loaded"):
        await unloaded.control.unload(None)


async def test_requests_wait_for_a_load(unloaded: Served) -> None:
    """As many as may queue, and no more; one that goes away makes room."""
    control, node = unloaded.control, unloaded.node
    node.load_gate.clear()
    control.load(None)
    waiting = [asyncio.ensure_future(control.loaded(None)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="2 requests wait"):
        await control.loaded(None)
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    third = asyncio.ensure_future(control.loaded(None))
    await asyncio.sleep(0)
    node.load_gate.set()
    assert await waiting[1] is await third is control.running()


async def test_requests_are_taken_before_everything_is_read(unloaded: Served) -> None:
    control, node = unloaded.control, unloaded.node
    node.read_gate.clear()
    control.load(None)
    assert (await generate(await unloaded.model(None), "dog")).text == "dog"
    assert control.state() == "loading"
    await control.unload(None, "cancel")
    assert control.state() == "no_model_loaded"
    await asyncio.sleep(0.05)
    assert (control.state(), control.error()) == ("no_model_loaded", None)


async def test_a_load_that_fails(unloaded: Served) -> None:
    """Who waited hears why, who comes later too, and it can be tried again."""
    control, node = unloaded.control, unloaded.node
    node.load_error = BudgetError("needs 5 GiB, has 4")
    control.load(None)
    with pytest.raises(BudgetError, match="needs 5 GiB"):
        await control.loaded(None)
    assert (control.state(), control.error()) == ("error", "needs 5 GiB, has 4")
    with pytest.raises(ConflictError, match="could not be loaded: needs 5 GiB, has 4"):
        await control.loaded(None)
    node.load_error = None
    await unloaded.load()
    assert control.error() is None


async def test_an_error_can_be_cleared(unloaded: Served) -> None:
    unloaded.node.load_error = ZeroDivisionError("a bug")
    unloaded.control.load(None)
    await unloaded.eventually(lambda: unloaded.control.state() == "error")
    assert unloaded.control.error() == "ZeroDivisionError: a bug"
    assert "cleared" in await unloaded.control.unload(None, "cancel")
    assert (unloaded.control.state(), unloaded.control.error()) == ("no_model_loaded", None)


async def test_what_cannot_be_read_ends_the_model(unloaded: Served) -> None:
    control, node = unloaded.control, unloaded.node
    node.read_gate.clear()
    node.read_error = CheckpointError("model.safetensors ends early")
    control.load(None)
    engine = await control.loaded(None)
    node.read_gate.set()
    await unloaded.eventually(lambda: control.state() == "error")
    assert control.error() == "model.safetensors ends early"
    assert engine.dead == "model.safetensors ends early"
    node.read_error = None
    await unloaded.load()
    assert node.loads == 2
    assert control.running() is not engine


async def test_a_model_whose_files_are_damaged_ends_alone(unloaded: Served) -> None:
    """B5: it is not loaded again and again; when the file is restored, it may be."""
    control = unloaded.control
    control.load(None)
    engine = await control.loaded(None)
    await unloaded.eventually(lambda: control.state() == "loaded")
    await control.end_damaged(MODEL, engine, DamagedError("/m/a.safetensors is damaged: bytes 1 to 2"))
    assert (control.state(), control.running()) == ("error", None)
    with pytest.raises(ConflictError, match="bytes 1 to 2"):
        await control.loaded(None)
    await control.end_damaged(MODEL, engine, DamagedError("of an engine that is gone"))
    control.load(None)
    await unloaded.eventually(lambda: control.state() == "loaded")


async def test_draining_lets_requests_end(unloaded: Served) -> None:
    await unloaded.load()
    control = unloaded.control
    unloaded.executor.gate.clear()
    answer = asyncio.ensure_future(generate(await unloaded.model(None), "one two three"))
    await unloaded.until(lambda stats: stats.running)
    unloading = asyncio.ensure_future(control.unload(None))
    await asyncio.sleep(0.05)
    assert control.state() == "unloading"
    with pytest.raises(ConflictError, match="is being unloaded; load it again"):
        await control.loaded(None)
    with pytest.raises(ConflictError, match="is being unloaded"):
        control.load(None)
    unloaded.executor.gate.set()
    assert (await answer).text == "one two three"
    await unloading
    assert control.state() == "no_model_loaded"


async def test_cancelling_ends_requests_also_while_they_are_drained(unloaded: Served) -> None:
    await unloaded.load()
    control, executor = unloaded.control, unloaded.executor
    executor.before_step[3] = executor.gate.clear
    answer = asyncio.ensure_future(generate(await unloaded.model(None), "one two three " * 9))
    await unloaded.eventually(lambda: executor.steps == 3)
    draining = asyncio.ensure_future(control.unload(None))
    await asyncio.sleep(0.05)
    assert not draining.done()
    cancelling = asyncio.ensure_future(control.unload(None, "cancel"))
    await asyncio.sleep(0.05)
    executor.gate.set()
    assert await cancelling == await draining
    with pytest.raises(Exception, match="it was unloaded"):
        await answer


async def test_unloading_goes_on_when_the_caller_goes_away(unloaded: Served) -> None:
    await unloaded.load()
    unloaded.executor.gate.clear()
    answer = asyncio.ensure_future(generate(await unloaded.model(None), "dog"))
    await unloaded.until(lambda stats: stats.running)
    caller = asyncio.ensure_future(unloaded.control.unload(None))
    await asyncio.sleep(0.01)
    caller.cancel()
    unloaded.executor.gate.set()
    assert (await answer).text == "dog"
    await unloaded.eventually(lambda: unloaded.control.state() == "no_model_loaded")


async def test_the_model_may_be_meant_by_its_path(unloaded: Served) -> None:
    control: ModelControl = unloaded.control
    assert control.resolve(None) == control.resolve("/models/llama") == control.resolve(MODEL) == MODEL


@pytest.mark.parametrize("fails", [False, True])
async def test_nothing_of_an_unloaded_model_is_kept(unloaded: Served, fails: bool) -> None:
    """E6: vocabulary, templates and grammars are the model's too, and nobody may ask for another one."""
    unloaded.node.read_gate.clear()
    unloaded.control.load(None)
    await generate(await unloaded.model(None), "one two")
    model = weakref.ref(await unloaded.model(None))
    engine = weakref.ref(unloaded.only)
    if fails:
        unloaded.node.read_error = CheckpointError("a file is gone")
    unloaded.node.read_gate.set()
    if not fails:
        await unloaded.eventually(lambda: unloaded.control.state() == "loaded")
        await unloaded.control.unload(None)
    await unloaded.eventually(lambda: unloaded.node.model is None)
    gc.collect()
    assert model() is None
    if not fails:
        assert engine() is None
