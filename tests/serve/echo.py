"""A model that repeats its prompt, on a node that loads, unloads and moves when a test lets it, and the application."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager

from prometheus_client.core import Metric
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backing

from raytier.actors.device import DeviceStatus, HostedModel, Move, MoveResult
from raytier.actors.group import GroupStatus
from raytier.actors.host import HostStatus
from raytier.actors.transfers import ParameterMover, TransferManager
from raytier.catalog.control import ModelControl
from raytier.checkpoint.manifest import GenerationDefaults, ModelDescription, ModelManifest, TokenizerSpec
from raytier.config import AppConfig, Scheduler, parse_config
from raytier.engine.config import EngineConfig
from raytier.engine.engine import Engine
from raytier.engine.outputs import EngineStats
from raytier.engine.step import Arrival, StepBatch, StepResult, TokenLogprobs
from raytier.engine.tokenizer import Tokenizer
from raytier.errors import EngineDeadError, ResourceNotAvailableError, TierError
from raytier.execution.parameters import ParameterStatus
from raytier.kv.block_pool import BlockPool
from raytier.kv.cache import KVCache
from raytier.model_entry import ModelEntry
from raytier.planner.budgets import DeviceKind
from raytier.planner.placement import plan_weights
from raytier.planner.plan import Tier, WeightPlan
from raytier.serve.runtime import Runtime
from raytier.serve.served import ServedModel
from raytier.sources.loader import FetchOptions, Loaders, ModelLoader, Progress
from raytier.sources.registry import Registry
from raytier.tiers.transfers import TransferQueue
from tests.planner.models import CPU_NODE, RATES, configuration, llama

MODEL = "org/echo"
BLOCK = 4
END = "<|end|>"
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user has to speak first') }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if shout %}!{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = ["The quick brown fox jumps over the lazy dog.", "Grüße aus Köln, 東京 and 🙂 everywhere.", "one two three four"]


#: As TEMPLATE, of a model that knows tools and thinks; results of tools and earlier calls are shown as JSON.
TOOL_TEMPLATE = (
    "{# <tool_call>, <think> #}{% for message in messages %}"
    "<|{{ 'user' if message.role == 'tool' else message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.arguments.a }}{% endfor %}{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(template: str = TEMPLATE) -> Tokenizer:
    """Byte-level BPE over a few sentences, trained here."""
    backing = Backing(models.BPE())
    backing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backing.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backing.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    special = [END, "<|system|>", "<|user|>", "<|assistant|>"]
    backing.add_special_tokens([AddedToken(name, special=True) for name in special])
    end = backing.token_to_id(END)
    return Tokenizer(TokenizerSpec(backing.to_str(), template, {"eos_token": END}, None, (end,), False))


class Echo:
    """Executor whose model repeats the prompt, as it lies in the blocks, and then ends.

    It thinks -0.5 of what it says, and -1.5 of token 5.

    Attributes:
        gate: steps wait here while it is cleared.
        before_step: step number (from 1) -> called when that step begins; may close the gate or raise.
    """

    def __init__(self, end: int) -> None:
        self._end = end
        self._slots: dict[int, int] = {}  # block * BLOCK + offset -> token
        self._arrived: dict[int, Arrival] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.before_step: dict[int, Callable[[], object]] = {}
        self.steps = 0

    def step(self, batch: StepBatch) -> StepResult:
        self.steps += 1
        self.before_step.get(self.steps, lambda: None)()
        assert self.gate.wait(30), "the test left the gate closed"
        drawn: dict[int, int] = {}
        result = StepResult(batch.step, drawn)
        self._arrived |= {arrival.seq_id: arrival for arrival in batch.arrivals}
        old = dict(self._slots)
        for copy in batch.copies:
            for offset in range(BLOCK):
                if (token := old.get(copy.source * BLOCK + offset)) is not None:
                    self._slots[copy.target * BLOCK + offset] = token
        for chunk in batch.chunks:
            slots = [block * BLOCK + offset for block in chunk.block_table for offset in range(BLOCK)]
            self._slots |= zip(slots[chunk.start : chunk.stop], chunk.token_ids, strict=True)
            known = [self._slots[slot] for slot in slots[: chunk.stop]]
            arrival = self._arrived[chunk.seq_id]
            length = arrival.prompt_len
            seen = range(max(chunk.start, arrival.logprobs_known - 1), min(chunk.stop, length - 1))
            if arrival.spec.prompt_logprobs is not None and seen:
                result.prompt_logprobs[chunk.seq_id] = tuple(_thought_of(arrival.tokens[at + 1]) for at in seen)
            if not chunk.draws:
                continue
            position = chunk.stop - length
            drawn[chunk.seq_id] = known[position] if position < length else self._end
            if arrival.spec.logprobs is not None:
                result.logprobs[chunk.seq_id] = _thought_of(drawn[chunk.seq_id])
        return result


def _thought_of(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -0.5, 1, ((token, -0.5), (5, -1.5)))


def die() -> None:
    """What an executor does when its actor is gone."""
    raise EngineDeadError("the device actor died (OOM)")


class EchoLoader(ModelLoader):
    """Files that are always there."""

    def __init__(self, config: AppConfig) -> None:
        pass

    def find(self, entry: ModelEntry) -> str | None:
        return entry.source_path

    async def load(self, entry: ModelEntry, progress: Progress, options: FetchOptions) -> str:
        return entry.source_path


class EchoPlace:
    """A tier whose room is counted in bytes."""

    def __init__(self, tier: Tier, manifest: ModelManifest, capacity: int) -> None:
        self.tier = tier
        self.capacity = capacity
        self.held: dict[str, int] = {}
        self._manifest = manifest

    def obtain(self, names: Iterable[str]) -> Move:
        wanted = {name: self._manifest.by_name[name].nbytes for name in names}
        if sum([*self.held.values(), *wanted.values()]) > self.capacity:
            raise ResourceNotAvailableError(f"no room in {self.tier}: {self.capacity} bytes, {len(self.held)} held")
        self.held |= wanted
        return Move(tuple(wanted), self.tier)

    def give_back(self, names: Sequence[str] | None = None) -> None:
        for name in list(self.held) if names is None else names:
            self.held.pop(name, None)


class EchoModel:
    """A loaded model: an engine that echoes, a plan, parameters that move when they are told to.

    Attributes:
        move_gate: moves wait here while it is cleared.
        move_error: what the next move fails with.
    """

    def __init__(self, node: EchoNode) -> None:
        self.model_id = MODEL
        self.description = node.description
        self.rates = RATES
        manifest = self.description.manifest
        self.plan = plan_weights(manifest, CPU_NODE, RATES, configuration(device_mb=64, host_mb=8), kind="cpu")
        self.host = EchoPlace(Tier.HOST, manifest, 2**20)
        self.mover = ParameterMover(
            MODEL,
            manifest,
            self.plan.tier_of,
            self._move,
            {Tier.HOST: self.host},
            schemes=self.plan.schemes,
            on_rounding=lambda: self.engine.clear_prefix_cache(),
            file_tiers=[Tier.NVME],
            kind="cpu",
        )
        self.move_gate = threading.Event()
        self.move_gate.set()
        self.move_error: Exception | None = None
        self.executor = Echo(node.tokenizer.spec.eos_token_ids[0])
        self.pool = BlockPool(BLOCK)
        self.pool.add_extent(1, node.blocks)
        defaults = GenerationDefaults(temperature=0.0, stop_token_ids=node.tokenizer.spec.eos_token_ids)
        tokens = int(node.scheduler.max_num_batched_tokens)
        config = EngineConfig(node.scheduler, tokens, tokens, node.max_context, node.tokenizer.vocab_size)
        self.engine = Engine(MODEL, self.executor, node.tokenizer, KVCache([self.pool]), defaults, config)

    def _move(self, order: Move) -> MoveResult:
        assert self.move_gate.wait(30), "the test left the gate closed"
        if self.move_error is not None:
            raise self.move_error
        sources = {name: self.mover.tier_of[name] for name in order.names}
        return MoveResult(sum(self.mover.manifest.by_name[n].nbytes for n in sources), 0.01, sources)


class EchoNode:
    """A node into which a model is loaded when a test lets it.

    Attributes:
        load_gate, read_gate: `load_model` and `wait_loaded` wait here while they are cleared.
        load_error, read_error: what they fail with.
    """

    kind: DeviceKind = "cpu"

    def __init__(self, tokenizer: Tokenizer, scheduler: Scheduler, blocks: int, max_context: int) -> None:
        self.tokenizer, self.scheduler, self.blocks, self.max_context = tokenizer, scheduler, blocks, max_context
        self.description = ModelDescription(llama(layers=2), tokenizer.spec)
        self.pids = {"device": 1, "host": 2}
        self.transfers = TransferManager(TransferQueue(capacity=2))
        self.models: dict[str, EchoModel] = {}
        self.device_budget = 64 * 2**20
        self.loads = 0
        self.load_gate, self.read_gate = threading.Event(), threading.Event()
        self.load_gate.set()
        self.read_gate.set()
        self.load_error: Exception | None = None
        self.read_error: Exception | None = None

    @property
    def model(self) -> EchoModel | None:
        return self.models.get(MODEL)

    def plan_model(self, model_id: str, description: ModelDescription, without: Collection[str]) -> WeightPlan:
        return plan_weights(description.manifest, CPU_NODE, RATES, configuration(device_mb=64, host_mb=8), kind="cpu")

    def load_model(self, model_id: str, description: ModelDescription, plan: WeightPlan | None = None) -> Engine:
        assert description is self.description
        assert model_id == MODEL and not self.models, "two models at once"
        self.loads += 1
        assert self.load_gate.wait(30), "the test left the gate closed"
        if self.load_error is not None:
            raise self.load_error
        model = self.models[MODEL] = EchoModel(self)
        self.transfers.attach(model.mover)
        return model.engine

    def wait_loaded(self, model_id: str) -> float:
        model = self.model
        assert model is not None
        while not self.read_gate.wait(0.01):
            if self.model is not model:
                raise TierError("the model was unloaded while it was being loaded")
        if self.read_error is not None:
            model.engine.close(str(self.read_error))
            raise self.read_error
        return 0.5

    def sleep_model(self, model_id: str, cancel: threading.Event) -> None:
        self.unload_model(model_id, cancel)

    def unload_model(self, model_id: str, cancel: threading.Event) -> None:
        if self.model is None:  # it was asleep
            return
        model = self.model
        assert model is not None
        while (stats := model.engine.stats()).dead is None and stats.running and not cancel.wait(0.01):
            pass
        model.engine.close("it was unloaded")
        self.transfers.detach(MODEL, "it was unloaded")
        self.transfers.settle(MODEL)
        del self.models[MODEL]

    def status(self, timeout_s: float = 1) -> GroupStatus:
        device = DeviceStatus(
            "d", 1, "cpu", 1, {MODEL: HostedModel(10, 20, 30, 40, 80, 0, 5, 250, 1000)}, (), 0, 0, 0.0
        )
        return GroupStatus(device=device, host=HostStatus("h", 2, 100, 60, 60, 40, {MODEL: 40}, 1, {}))

    def layers(self, model_id: str, timeout_s: float = 1) -> tuple[ParameterStatus, ...]:
        if self.model is None:
            return ()
        return tuple(
            ParameterStatus(p.name, p.layer, self.model.mover.tier_of[p.name], p.nbytes, p.nbytes, None, 7, 1.5e9)
            for p in self.description.manifest.parameters
        )


class Served:
    """One application as a `Backend`: real routes, runtime and control over a node that echoes."""

    created = 1_700_000_000

    def __init__(
        self,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        blocks: int,
        max_context: int,
        timeout_s: float | None = None,
    ) -> None:
        self.node = EchoNode(tokenizer, scheduler, blocks, max_context)
        entry = {"model_id": MODEL, "source_type": "echo", "source_path": "/models/llama"}
        config = parse_config({"models": [entry], "loaders": {"echo": "tests.serve.echo:EchoLoader"}})
        registry, loaders = Registry.of(config), Loaders(config)
        self.control = ModelControl(self.node, registry, loaders, self._describe, scheduler.max_queue)
        self.control.remember(MODEL, self.node.description)
        self.runtime = Runtime("app", self.node, self.control, request_timeout_s=timeout_s)
        self.reason: str | None = None

    def _describe(self, entry: ModelEntry, directory: str) -> ModelDescription:
        return self.node.description

    @property
    def loaded(self) -> EchoModel:
        assert self.node.model is not None
        return self.node.model

    @property
    def only(self) -> Engine:
        return self.loaded.engine

    @property
    def executor(self) -> Echo:
        return self.loaded.executor

    @property
    def pool(self) -> BlockPool:
        return self.loaded.pool

    async def load(self) -> None:
        """Load the model and wait until it is."""
        self.control.load(None)
        await self.eventually(lambda: self.control.state() == "loaded")

    def model_ids(self) -> list[str]:
        return [MODEL]

    def using(self, model_id: str | None) -> AbstractAsyncContextManager[ServedModel]:
        return self.runtime.using(model_id)

    async def model(self, model_id: str | None) -> ServedModel:
        """As `using`, for tests that let the model go only when they end."""
        async with self.using(model_id) as served:
            return served

    def metrics(self) -> Iterable[Metric]:
        return self.runtime.metrics()

    def health(self) -> str | None:
        return self.reason

    async def eventually(self, condition: Callable[[], object]) -> None:
        """Wait for something that no event of asyncio's tells of."""

        async def met() -> None:
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)

        await asyncio.wait_for(met(), 10)

    async def until(self, condition: Callable[[EngineStats], object]) -> None:
        """Wait for something in the engine's statistics."""
        await self.eventually(lambda: condition(self.only.stats()))

    async def idle(self) -> None:
        """Wait until the engine holds nothing."""
        await self.until(lambda stats: not (stats.running or stats.waiting or stats.kv_blocks_used))

    def close(self) -> None:
        self.node.load_gate.set()
        self.node.read_gate.set()
        self.node.transfers.close("the test has ended")
        self.control.close()
        if self.node.model is not None:
            self.loaded.move_gate.set()
            self.executor.gate.set()
            self.only.close()
