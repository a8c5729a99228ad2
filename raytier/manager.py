"""ModelManager: the models of a models.yaml in Python, without Serve or HTTP, through the same actors (spec E4)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from raytier.actors.describer import Describer
from raytier.actors.local import LocalNode
from raytier.catalog.control import ModelControl
from raytier.catalog.life import State, UnloadMode
from raytier.config import parse_config
from raytier.engine.outputs import OutputDelta, merge
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.tokenizer import Tokenizer
from raytier.errors import ConflictError
from raytier.model_entry import ModelEntry
from raytier.sources.loader import FetchOptions, Loaders
from raytier.sources.registry import Registry, parse_entry


class ManagedModel:
    """What generates with a model of a `ModelManager`. It may sleep meanwhile: a request wakes it."""

    def __init__(self, control: ModelControl, model_id: str) -> None:
        self._control = control
        self.model_id = model_id

    async def generate(self, prompt: str | Sequence[int], **sampling: Any) -> list[OutputDelta]:
        """Continue a raw prompt to its end: the whole of each of its `n` samples, in order.

        Args:
            sampling: fields of `SamplingParams`: max_tokens, temperature, top_p, n, seed, stop, ...

        Raises:
            InvalidRequestError: the prompt or a value cannot be served. ConflictError: the model was unloaded.
            QueueFullError: too many wait. EngineDeadError: an actor died. GenerationError: no token is left to draw.
        """
        samples: dict[int, list[OutputDelta]] = {}
        async with aclosing(self.generate_stream(prompt, **sampling)) as deltas:
            async for delta in deltas:
                samples.setdefault(delta.index, []).append(delta)
        return [merge(samples[index]) for index in sorted(samples)]

    async def generate_stream(self, prompt: str | Sequence[int], **sampling: Any) -> AsyncGenerator[OutputDelta, None]:
        """The same, delta by delta, of all samples; raises as `generate`. Closing the generator aborts."""
        async with self._control.use(self.model_id) as engine:
            params = SamplingParams.from_request(engine.defaults, **sampling)
            checked = await asyncio.to_thread(engine.check, params)
            encoded = await asyncio.to_thread(engine.tokenizer.encode, prompt) if isinstance(prompt, str) else prompt
            deltas = engine.stream(list(encoded), checked)
            try:
                async for delta in deltas:
                    yield delta
            finally:
                await deltas.aclose()  # type: ignore[attr-defined] # it is a generator


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that takes requests.

    Attributes:
        config: its entry.
        model_object: generates.
        tokenizer_object: of the model; without transformers.
        device: what it computes on.
    """

    config: ModelEntry
    model_object: ManagedModel
    tokenizer_object: Tokenizer
    device: Literal["cpu", "cuda"]


class ModelManager:
    """Loads, keeps and unloads the models of a file, all within the budgets of one node.

        async with ModelManager(config_path="models.yaml") as manager:
            model = await manager.get_model_instance("llama-8b")
            [answer] = await model.model_object.generate("Once upon a time", max_tokens=16)

    Args:
        config_path: the models.yaml, see `raytier.sources.registry`.
        settings: sections of the configuration (`tiers`, `kv`, `switching`, ...), as in a Serve application.

    Raises:
        ConfigurationError: names file, entry and field.

    Its methods belong to one event loop. The actors, and Ray where this process is in no cluster, are started by the
    first load and ended by `close`. Models give way to each other as in an application (`ModelControl`).
    """

    def __init__(self, config_path: str, **settings: Any) -> None:
        self._config = parse_config({"registry": config_path, "startup_model": None, **settings})
        self._registry = Registry.of(self._config)
        self._loaders = Loaders(self._config)
        for entry in self._registry.entries:
            self._loaders.of(entry)
        self._starting = asyncio.Lock()
        self._node: LocalNode | None = None
        self._control: ModelControl | None = None
        self._closed = False

    def list_available_models(self) -> list[dict[str, str]]:
        """`model_id`, `source_type`, `status` and `device` of every model, in the order of the file."""
        return [
            {
                "model_id": entry.model_id,
                "source_type": entry.source_type,
                "status": self._state(entry.model_id),
                "device": entry.device_preference if self._node is None else self._node.group.kind,
            }
            for entry in self._registry.entries
        ]

    def get_model_configuration(self, model_id: str) -> ModelEntry:
        """The entry of a model; ModelNotFoundError names the known ones."""
        return self._registry.get(model_id)

    def register_model(self, config: ModelEntry | dict[str, Any], persist: bool = True) -> bool:
        """Add a model, or change what is known of one, which takes effect when it is loaded next; False when it was
        known so. With `persist` the file is changed, its comments and order stay.

        Raises:
            ConfigurationError: a field is wrong, or the file cannot be written.
        """
        entry = config if isinstance(config, ModelEntry) else parse_entry(config)
        self._loaders.of(entry)
        return self._registry.put(entry, persist=persist)

    async def load_model(self, model_id: str, force_reload: bool = False, *, token: str | None = None) -> LoadedModel:
        """Load a model, or wake it, and return it as soon as it takes requests; calls at once share one load.

        Args:
            force_reload: load it anew from its files when it is loaded.
            token: for its source; never stored or logged.

        Raises:
            ModelNotFoundError, ModelLoadingError, ResourceNotAvailableError, ConflictError, ...: as the message says.
        """
        entry = self._registry.get(model_id)
        control = await self._started()
        control.load(model_id, FetchOptions(token), force_reload=force_reload)
        engine = await control.loaded(model_id)
        assert self._node is not None
        return LoadedModel(entry, ManagedModel(control, model_id), engine.tokenizer, self._node.group.kind)

    async def get_model_instance(self, model_id: str) -> LoadedModel:
        """A model that takes requests, loaded or woken if needed; raises as `load_model`."""
        return await self.load_model(model_id)

    async def unload_model(self, model_id: str, mode: UnloadMode = "drain") -> bool:
        """Unload a model and free everything of it; False when it was not loaded.

        Raises:
            ModelNotFoundError: no such model. ConflictError: it is being loaded, and `mode` is not cancel.
        """
        if self._state(model_id) == "no_model_loaded":
            return False
        assert self._control is not None, "nothing has a state before there is a node"
        await self._control.unload(model_id, mode)
        return True

    async def sleep_model(self, model_id: str, mode: UnloadMode = "drain") -> bool:
        """Put a model to sleep; False when it was not loaded. Raises ModelNotFoundError, ConflictError: not now."""
        if self._state(model_id) == "no_model_loaded":
            return False
        assert self._control is not None, "nothing has a state before there is a node"
        await self._control.sleep(model_id, mode)
        return True

    def _state(self, model_id: str) -> State:
        self._registry.get(model_id)
        return "no_model_loaded" if self._control is None else self._control.state(model_id)

    async def _started(self) -> ModelControl:
        async with self._starting:
            if self._closed:
                raise ConflictError("this ModelManager is closed; make another one")
            if self._control is None:
                name = f"manager-{id(self):x}"
                self._node = await asyncio.to_thread(LocalNode, name, self._config)
                self._control = ModelControl(
                    self._node.group,
                    self._registry,
                    self._loaders,
                    Describer(),
                    self._config.scheduler.max_queue,
                    self._config.switching,
                )
                self._control.watch_idle()
            return self._control

    async def close(self) -> None:
        """End all models, the actors and, where it was started here, Ray. A second call does nothing."""
        async with self._starting:
            self._closed = True
            control, self._control = self._control, None
            node, self._node = self._node, None
            if control is not None:
                control.close()
            if node is not None:
                await asyncio.to_thread(node.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
