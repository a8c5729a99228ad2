"""Wire format of the runtime's own API (`/api`): field names as in the "Fields" section of the specification.

Sizes named `_mb` are in units of 2**20 bytes, times are Unix time in seconds. The same objects are what deployment
handles return.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from raytier.catalog.life import State, UnloadMode
from raytier.hardware.inventory import NodeInventory
from raytier.hardware.rates import Rates
from raytier.kv.ledger import KVStats
from raytier.planner.plan import DevicePlan, Tier


def _secret(value: object) -> object:
    """Refuse what is no text without saying what it was."""
    if value is None or isinstance(value, str | SecretStr):
        return value
    raise PydanticCustomError("raytier", "{message}", {"message": "must be a string"})


Secret = Annotated[
    SecretStr | None, BeforeValidator(_secret), WithJsonSchema({"type": "string", "format": "password", "default": ""})
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


# --- models -----------------------------------------------------------------------------------------------------------


class LoadRequest(_Request):
    """Body of POST /api/models/load."""

    model_name_or_path: str = Field(min_length=1, description="Id of a model of this application, or its path.")
    compute_device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: what the application was started for; anything else must be just that."
    )
    hf_token: Secret = Field(None, description="For models from a hub; never stored or logged.")
    force_reload: bool = Field(False, description="Load it anew from its files when it is loaded.")


class UnloadRequest(_Request):
    """Body of POST /api/models/unload."""

    model: str | None = Field(None, description="Absent: the startup model, or the only one.")
    mode: UnloadMode = Field("drain", description="drain: requests that run come to their end; cancel: they are ended.")


class SleepRequest(UnloadRequest):
    """Body of POST /api/models/sleep."""


class WakeRequest(_Request):
    """Body of POST /api/models/wake."""

    model: str | None = Field(None, description="Absent: the startup model, or the only one.")


class RegisterRequest(_Request):
    """Body of POST /api/models/register."""

    model: dict[str, Any] = Field(description="An entry of models.yaml.")
    persist: bool = Field(True, description="Write it to the registry file; false: until the application ends.")


class LoadProgress(_Answer):
    """How far loading is. `seconds_left` is null before it can be told."""

    bytes_loaded: int
    bytes_total: int
    seconds_left: float | None


class ModelStatus(_Answer):
    """State of a model. While it is `loading` requests are accepted: each waits for what it needs."""

    model_name: str
    model_path: str
    architecture: str | None = Field(description="Null until the model has been looked at.")
    tokenizer_name: str
    num_managed_layers: int = Field(description="Entries of /api/layers: parameters that have a place in a tier.")
    compute_device: str
    status: State
    progress: LoadProgress | None
    error_message: str | None


class OperationAnswer(_Answer):
    """What came of a request to load, unload, put to sleep or wake."""

    message: str
    model: ModelStatus


class ListedModel(_Answer):
    """A model of the registry. `config`: its entry, without secrets."""

    model_id: str
    source_type: str
    status: State
    device: str
    pinned: bool
    config: dict[str, Any]


class RegisterAnswer(_Answer):
    """`changed`: it was not known so before."""

    changed: bool
    model: ListedModel


class GenerateRequest(_Request):
    """Body of POST /api/models/generate. What is absent comes from the model's own generation defaults."""

    prompt: str = Field(min_length=1)
    model: str | None = Field(None, description="Absent: the startup model, or the only one.")
    max_new_tokens: int | None = Field(None, ge=1, le=8192, description="Without a default of the model: 128.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Without a default of the model: 0.7.")
    top_p: float | None = Field(None, gt=0, le=1, description="Without a default of the model: 0.9.")
    top_k: int | None = Field(None, ge=-1, description="0 or -1: all.")


class GenerateAnswer(_Answer):
    prompt: str
    generated_text: str
    model_name: str
    tokens_generated: int
    generation_time_seconds: float


# --- layers and transfers ---------------------------------------------------------------------------------------------


class Layer(_Answer):
    """One parameter. On a node without a GPU the device and the host pool are both `cpu`: /api/plan names the tier."""

    id: int
    name: str
    layer_index: int | None = Field(description="Decoder layer; null outside of them.")
    original_size_mb: float
    current_size_mb: float
    current_device: Literal["gpu", "cpu", "ramdisk", "nvme"]
    gpu_id: int | None
    quantization_type: str
    compression_type: str
    access_count: int = Field(description="Steps that used it.")
    last_access_timestamp: float | None


class LayerGroup(_Answer):
    """The parameters of one decoder layer together; `layer_index` null: those outside of the layers."""

    layer_index: int | None
    name: str
    num_parameters: int
    original_size_mb: float
    current_size_mb: float
    size_mb_by_tier: dict[Tier, float]
    access_count: int
    last_access_timestamp: float | None


class TransferRequest(_Request):
    """Body of POST /api/layers/transfer: `layer_id` moves one parameter, `layer_index` a decoder layer."""

    layer_id: int | str | None = Field(None, description="Id or name of a parameter, as /api/layers lists them.")
    layer_index: int | None = Field(None, ge=0)
    destination_device: str = Field(
        description="cpu or host, gpu:N or device:N (device alone: the only one), ramdisk, nvme."
    )
    priority: int = Field(5, ge=1, le=10, description="1 goes first.")
    model: str | None = Field(None, description="Absent: the startup model, or the only one.")

    @model_validator(mode="after")
    def _one_target(self) -> TransferRequest:
        if (self.layer_id is None) == (self.layer_index is None):
            message = "give either layer_id (one parameter) or layer_index (a whole decoder layer)"
            raise PydanticCustomError("raytier", "{message}", {"param": "layer_id", "message": message})
        return self


class TransferAnswer(_Answer):
    """A transfer that was taken in; its status is at /api/layers/transfer/{transfer_id}."""

    transfer_id: str
    message: str
    layer_id: int | None = Field(description="Null where a whole decoder layer is moved.")
    source: str
    destination: str
    priority: int


class TransferStatus(_Answer):
    """`reason` says why a transfer failed, or what there was to do. `nbytes` counts what was moved."""

    transfer_id: str
    status: Literal["pending", "processing", "completed", "failed"]
    reason: str | None
    layer_id: int | None
    layer_index: int | None
    source: str
    destination: str
    priority: int
    nbytes: int
    seconds: float | None = Field(description="From its start to its end.")


# --- plan -------------------------------------------------------------------------------------------------------------


class PlacedParameter(_Answer):
    """`tier` is where it lives now, `planned_tier` and `reason` what the planner decided."""

    id: int
    name: str
    nbytes: int
    tier: Tier
    planned_tier: Tier
    reason: str


class PredictedStep(_Answer):
    batch: int
    seconds: float
    io_seconds: float
    compute_seconds: float
    attention_seconds: float
    overhead_seconds: float
    tokens_per_second: float


class PlanAnswer(_Answer):
    """The plan by which the model was loaded, with the places that its parameters have now."""

    model_name: str
    model_path: str
    devices: list[DevicePlan]
    placements: list[PlacedParameter]
    bytes_by_tier: dict[Tier, int] = Field(description="Parameter bytes, by the tier in which they live now.")
    streamed_bytes: int = Field(description="Bytes that a step streams under the plan.")
    predictions: list[PredictedStep] = Field(description="Steps of sequences of `context` tokens.")
    context: int
    first_token_seconds: float
    warnings: list[str]
    notes: list[str]


# --- KV ---------------------------------------------------------------------------------------------------------------


class KVTierUse(_Answer):
    """KV blocks of a tier. Those that are cached are free: no sequence uses them, what they hold is found again."""

    tier: Tier
    total_blocks: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    total_bytes: int
    used_bytes: int
    cached_bytes: int
    evictions: int


class KVGroupUse(_Answer):
    """The layers of one attention window, which share block tables; `window` null: full attention."""

    window: int | None
    num_layers: int
    block_bytes: int
    total_blocks: int
    used_blocks: int
    cached_blocks: int


class KVSequence(_Answer):
    """A running sample of a request; `shared_blocks` are other sequences' as well."""

    request_id: str
    index: int
    num_tokens: int
    num_computed: int
    num_blocks: int
    shared_blocks: int


class PrefixCacheCounts(_Answer):
    """Tokens looked up when sequences began, and those that were found, by tier."""

    queries: int
    hits: int
    hit_rate: float
    hits_by_tier: dict[Tier, int]


class KVAnswer(_Answer):
    """Answer of GET /api/kv. Counters begin anew with every load."""

    model_name: str
    block_size: int = Field(description="In tokens.")
    pressure: Literal["low", "high", "critical"]
    free_fraction: float
    high_free_fraction: float
    critical_free_fraction: float
    tiers: list[KVTierUse]
    groups: list[KVGroupUse]
    active_sequences: int
    allocations: int
    failures: int
    copies: int = Field(description="Blocks copied because several sequences shared them.")
    forks: int = Field(description="Samples that began with the blocks of another one.")
    preemptions: int
    restarts: int = Field(description="Sequences that began again because their KV could not be loaded.")
    dropped_blocks: int = Field(description="Blocks given up for lack of room below the device, and worth keeping.")
    write_failures: int = Field(description="Blocks that could not be written to the disk.")
    lost_blocks: int = Field(description="Blocks that could not be loaded.")
    prefix_cache: PrefixCacheCounts
    sequences: list[KVSequence]
    ledger: KVStats | None = Field(description="What the KVBlockActor knows, as of its last report; null without one.")


# --- server -----------------------------------------------------------------------------------------------------------


class TierHealth(_Answer):
    """Health of a tier (spec A6). What a tier does not know is null."""

    tier: Tier
    used_bytes: int
    capacity_bytes: int | None
    free_bytes: int | None
    files: int | None = None
    reads: int | None = None
    writes: int | None = None
    bytes_read: int | None = None
    bytes_written: int | None = None
    errors: int | None = None
    utilization: float | None = Field(None, description="Of the measured rate, 0 to 1.")


class HardwareSummary(_Answer):
    """The node, its measured rates (null until they are measured, with the first load), and its tiers."""

    inventory: NodeInventory
    rates: Rates | None
    tiers: list[TierHealth]


class ActorInfo(_Answer):
    name: str
    role: str
    pid: int


class ServerStatus(_Answer):
    """Answer of GET /api/status."""

    server_status: Literal["running", "unavailable"]
    uptime_seconds: float
    model_status: ModelStatus | list[ModelStatus] = Field(description="A list where there are several models.")
    hardware_summary: HardwareSummary
    layer_transfer_queue_size: int
    prefetch_job_queue_size: int
    active_actors: list[ActorInfo]
    log_file_path: str | None


class Overview(_Answer):
    """Answer of GET /api."""

    name: str
    version: str
    docs: str
    routes: dict[str, str]
