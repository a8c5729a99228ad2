"""LLM: offline batches in Python, without Serve or HTTP, through the same actors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from raytier.actors.group import GroupStatus
from raytier.actors.local import LocalNode
from raytier.actors.model import LoadedModel
from raytier.checkpoint.manifest import ModelManifest
from raytier.config import parse_config
from raytier.engine.outputs import EngineStats, OutputDelta
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.step import TokenLogprobs
from raytier.execution.parameters import ParameterStatus
from raytier.hardware.rates import Rates
from raytier.planner.plan import WeightPlan
from raytier.sources.loader import Loaders
from raytier.tiers.transfers import DEFAULT_PRIORITY, Transfer


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished sample of a prompt.

    Attributes:
        token_ids: with the token that stopped it, if one did.
        finish_reason: stop or length.
        index: of the sample among those of its prompt, 0 to n - 1.
        logprobs: of each of `token_ids`, where they were asked for.
        prompt_logprobs: of each token of the prompt (None for the first), where they were asked for, in the first
            sample.
        stop_reason: the stop string or stop token of the request that ended it.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    stop_reason: str | int | None = None


class LLM:
    """A model on this machine's actors.

        with LLM("builtin:demo") as llm:
            for result in llm.generate(["Once upon a time", "The capital of France is"], max_tokens=16):
                print(result.text)

    Args:
        model: absolute path of a model directory, or `builtin:demo`.
        settings: sections of the configuration (`tiers`, `kv`, `scheduler`, ...), as in a Serve application.

    Raises:
        ConfigurationError, CheckpointError, UnsupportedModelError, BudgetError, ResourceNotAvailableError.

    Attributes:
        engine: the running `Engine`, for what goes beyond batches: `submit`, `stream`, `abort`.

    Ray is started on this machine when the process is not connected to a cluster yet, and ended by `close`.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self._model_id = model.rstrip("/").rpartition("/")[2] or "model"
        self._config = parse_config({"models": [{"model_id": self._model_id, "source_path": model}], **settings})
        Loaders(self._config).find(self._config.models[0])  # before Ray is started for nothing
        self._node = LocalNode(f"llm-{id(self):x}", self._config)
        self._group = self._node.group
        try:
            assert self._node.description is not None, "a local model is described before"
            self.engine = self._group.load_model(self._model_id, self._node.description)
            self._group.wait_loaded(self._model_id)
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]], **sampling: Any
    ) -> list[Completion]:
        """Continue raw prompts as one batch; results in the order of the prompts, the `n` samples of each in a row.

        Args:
            prompts: a text, a list of texts, one list of token ids, or a list of those.
            sampling: fields of `SamplingParams`, for all prompts: max_tokens, temperature, top_p, n, seed, stop,
                logprobs, structured_outputs, ...

        Raises:
            InvalidRequestError: a prompt or a sampling value cannot be served. EngineDeadError: an actor died.
            GenerationError: what is allowed leaves no token to draw.
        """
        batch: Sequence[Any] = [prompts] if isinstance(prompts, str) or _is_ids(prompts) else prompts
        tokenizer = self.engine.tokenizer
        return self._run([tokenizer.encode(p) if isinstance(p, str) else list(p) for p in batch], sampling)

    def chat(self, conversations: Sequence[Any], **sampling: Any) -> list[Completion]:
        """Continue conversations: one list of `{"role": ..., "content": ...}`, or a list of such lists."""
        batch = [conversations] if conversations and isinstance(conversations[0], Mapping) else conversations
        tokenizer = self.engine.tokenizer
        # The rendered template holds its special tokens already.
        prompts = [tokenizer.encode(tokenizer.apply_chat_template(c), add_special_tokens=False) for c in batch]
        return self._run(prompts, sampling)

    def _run(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[Completion]:
        params = SamplingParams.from_request(self.engine.defaults, **sampling)
        return [_completion(delta) for delta in self.engine.generate(prompts, params)]

    def stats(self) -> EngineStats:
        """Counters of the engine; they stay readable after `close`."""
        return self.engine.stats()

    def status(self) -> GroupStatus:
        """What every actor holds and has done.

        Raises:
            EngineDeadError: an actor died, or this object is closed. TimeoutError: one does not answer.
        """
        return self._group.status()

    @property
    def plan(self) -> WeightPlan:
        """Where the parameters were put when the model was loaded, and what that was predicted to cost."""
        return self._model.plan

    @property
    def rates(self) -> Rates:
        """How fast this node was measured to be: what the plan was made by."""
        return self._model.rates

    @property
    def manifest(self) -> ModelManifest:
        """What the model is made of."""
        return self._model.description.manifest

    def layers(self) -> tuple[ParameterStatus, ...]:
        """Every parameter and where it is now; raises as `status`."""
        return self._group.layers(self._model_id)

    def transfer(
        self,
        parameter: int | str | None = None,
        destination: str = "",
        priority: int = DEFAULT_PRIORITY,
        *,
        layer: int | None = None,
        on_finished: Callable[[Transfer], None] | None = None,
    ) -> Future[Transfer]:
        """Move a parameter (its name, or its place in `layers()`), or a decoder layer, while generation goes on.

            llm.transfer(layer=3, destination="nvme").result()

        Args:
            destination: cpu or host, gpu:N or device:N, ramdisk, nvme.
            priority: 1 (first) to 10.
            on_finished: called with the end of the transfer, on a thread of this object's.

        Returns:
            What becomes the finished transfer, failed or completed: `state` and `reason` say which.

        Raises:
            ParameterNotFoundError, InvalidRequestError: what is to move, or where to, does not exist or cannot be.
            TransferQueueFullError: too many wait. ResourceNotAvailableError: this object is closed.
        """
        mover = self._model.mover
        target, tier = mover.target(parameter, layer=layer), mover.destination(destination)
        transfers = self._group.transfers
        return transfers.future(transfers.submit(mover.model_id, target, tier, priority, on_finished).id)

    @property
    def _model(self) -> LoadedModel:
        return self._group.models[self._model_id]

    def close(self) -> None:
        """End the engine and its actors and, where this object started it, Ray. A second call does nothing."""
        self._node.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_ids(prompts: Sequence[Any]) -> bool:
    return bool(prompts) and isinstance(prompts[0], int)


def _completion(delta: OutputDelta) -> Completion:
    assert delta.finish_reason is not None
    return Completion(
        delta.text,
        delta.token_ids,
        delta.finish_reason,
        delta.prompt_tokens,
        delta.completion_tokens,
        delta.index,
        delta.logprobs,
        delta.prompt_logprobs,
        delta.stop_reason,
    )
