"""The application's configuration: one pydantic tree, one place for every default.

The same tree is the `args:` of a Serve application, the keyword arguments of `raytier.LLM` and what
the CLI reads. Unknown keys are refused. Sizes carry their unit in their name (`_mb` = 2**20 bytes).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator

from raytier.errors import ConfigurationError
from raytier.model_entry import ModelEntry
from raytier.problems import explain
from raytier.weight_settings import Auto, CompressionSection, Placement, PrecisionSection, Section

MIB = 2**20


class DeviceTier(Section):
    """Memory of the computing device: GPU memory, or RAM of the compute process on a CPU node."""

    max_utilization: float = Field(0.9, gt=0, le=1)
    reserved_mb: float = Field(256, ge=0)
    max_mb: float | None = Field(None, gt=0)


class HostTier(Section):
    """RAM pool of the node, shared by its processes."""

    max_utilization: float = Field(0.8, gt=0, le=1)
    reserved_mb: float = Field(1024, ge=0)
    max_mb: float | None = Field(None, ge=0)


class RamdiskTier(Section):
    """A directory on a tmpfs; `path` null: /dev/shm. `mount`: mount a tmpfs of `size_mb` at `path` (needs root)."""

    enabled: bool = False
    path: str | None = None
    mount: bool = False
    size_mb: float = Field(1024, gt=0)
    usable_percent: float = Field(95, gt=0, le=100)
    cleanup_on_exit: bool = True

    @model_validator(mode="after")
    def _mount_has_a_place(self) -> RamdiskTier:
        if self.path is not None and not Path(self.path).is_absolute():
            raise ValueError("path must be absolute")
        if self.mount and self.path is None:
            raise ValueError("mount needs a path to mount at")
        return self


class NvmeTier(Section):
    """Disk. Without `paths`, parameters are read in place from the checkpoint's own files, and nothing is written.

    With `paths`, what the tier holds is copied there, striped over all of them in stripes of `stripe_mb`;
    `min_free_gb` of every one stays free.
    """

    enabled: bool = True
    paths: tuple[str, ...] = ()
    max_gb: float | None = Field(None, ge=0)
    min_free_gb: float = Field(5, ge=0)
    stripe_mb: float = Field(16, ge=0.0625, le=1024)
    io_threads: int = Field(4, ge=1, le=64)
    io_mb: float = Field(8, ge=0.0625, le=256)

    @field_validator("paths")
    @classmethod
    def _absolute(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        relative = [path for path in value if not Path(path).is_absolute()]
        if relative:
            raise ValueError(f"must be absolute directories, {relative} are not")
        if len({os.path.realpath(path) for path in value}) < len(value):
            raise ValueError("a directory is named twice")
        return value


class Tiers(Section):
    device: DeviceTier = DeviceTier()
    host: HostTier = HostTier()
    ramdisk: RamdiskTier = RamdiskTier()
    nvme: NvmeTier = NvmeTier()


class Prefetch(Section):
    """`window`: decoder layers read ahead of the one that computes; auto = from the plan."""

    window: int | Auto = "auto"

    @field_validator("window")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value


class KVCache(Section):
    """Paged KV. The split of the device budget between weights and KV follows from the expected load.

    `prefix_caching`: prompts begin with the KV of earlier ones as far as they are the same, in whole blocks and at
    least `min_prefix_blocks` of them; up to `max_cached_blocks` blocks that no sequence uses are kept for that (null:
    all). `sharing`: the samples of a request share the blocks of its prompt.
    `high_free_fraction`, `critical_free_fraction`: where less than these is free, pressure is high or critical; while
    it is critical no further sequence begins.
    """

    block_size: int = Field(16, ge=1, le=1024)
    max_blocks: int | None = Field(None, ge=2)
    expected_sequences: int | Auto = "auto"  # auto: min(8, max_num_seqs)
    expected_context: int | Auto = "auto"  # tokens; auto: min(2048, the model's context)
    prefix_caching: bool = True
    sharing: bool = True
    min_prefix_blocks: int = Field(1, ge=1)
    max_cached_blocks: int | None = Field(None, ge=0)
    high_free_fraction: float = Field(0.3, ge=0, le=1)
    critical_free_fraction: float = Field(0.1, ge=0, le=1)
    swapping: bool = True
    host_mb: Annotated[float, Field(ge=0)] | Auto = "auto"
    disk_gb: float = Field(0, ge=0)
    disk_once: bool = False
    persist: bool = False

    @model_validator(mode="after")
    def _critical_is_less(self) -> KVCache:
        if self.persist and not self.disk_gb:
            raise ValueError("persist keeps what is on disk: set disk_gb to more than 0")
        if self.critical_free_fraction > self.high_free_fraction:
            raise ValueError("critical_free_fraction must not be above high_free_fraction")
        return self


class Scheduler(Section):
    """`max_num_batched_tokens`: tokens that one step carries; auto = from the plan: beside running streams as many of a
    prompt as keep them going, but no fewer than what the sweep's reading hides, and up to 512 where none runs.
    `policy`: who goes first: fcfs = in order of arrival, priority = by the request's priority (lower ones first)."""

    max_num_seqs: int = Field(32, ge=1, le=4096)
    max_num_batched_tokens: int | Auto = "auto"
    max_queue: int = Field(256, ge=1)
    policy: Literal["fcfs", "priority"] = "fcfs"

    @field_validator("max_num_batched_tokens")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value


class Compute(Section):
    """Where the model runs. `auto` takes a CUDA device when there is one. `threads: auto` = all cores."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | Auto = "auto"

    def resolve_threads(self, cpus: int) -> int:
        """Threads to compute with on a node of `cpus` CPUs."""
        return cpus if self.threads == "auto" else self.threads


#: A key that is written here by mistake is hardly ever such a name.
_Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class KeySource(Section):
    """Where keys are, several divided by white space: in a file, or in a variable of the replica's environment.

    A variable that is named here has to be there; the default one may be missing, and then no key is asked for.
    """

    file: str | None = None
    env: _Variable

    @field_validator("file")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_absolute():
            raise ValueError("must be an absolute path")
        return value


class ApiKey(KeySource):
    env: _Variable = "RAYTIER_API_KEY"


class AdminKey(KeySource):
    env: _Variable = "RAYTIER_ADMIN_KEY"


class UpstreamKey(KeySource):
    env: _Variable = "RAYTIER_UPSTREAM_KEY"


class Upstream(Section):
    """An OpenAI-compatible server that gets requests for models which are not held here.

    `base_url`: up to and with /v1. `timeout_s`: longest silence. `key`: sent to it; what clients send here never is.
    """

    base_url: str | None = None
    timeout_s: float = Field(120, gt=0)
    connect_timeout_s: float = Field(5, gt=0)
    key: UpstreamKey = UpstreamKey()

    @field_validator("base_url")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        url = urlsplit(value)
        if url.username is not None or url.password is not None:
            # It stands in messages to clients and in the log.
            raise ValueError("must hold no user and no password; the upstream's key goes into upstream.key")
        if not url.hostname or url.query or url.fragment:
            raise ValueError("must name a host, and end with a path (/v1)")
        return value.rstrip("/")


class ApiSection(Section):
    """The HTTP front. `key`: of those who may call; `admin_key`: of those who may load, unload and move models.

    `max_body_mb`: largest request; a prompt of a million tokens as JSON integers is about 7 MB.
    `request_timeout_s`: longest life of a request in the engine, its time in the queue included; the wait for a model
    that is being loaded, and the preparation of the prompt, come before. null = no limit.
    """

    key: ApiKey = ApiKey()
    admin_key: AdminKey = AdminKey()
    max_body_mb: float = Field(32, gt=0)
    request_timeout_s: float | None = Field(None, gt=0)
    upstream: Upstream = Upstream()


class HuggingFace(Section):
    """Models of source_type huggingface.

    `cache_dir`, `endpoint`: null = Hugging Face's own (HF_HUB_CACHE, HF_ENDPOINT). `token_env`: the variable with the
    token for models that need one. `offline`: only what the cache holds. `trust_remote_code`: as the field of a model,
    for all of them.
    """

    cache_dir: str | None = None
    endpoint: Annotated[str, Field(pattern=r"^https?://[^/]")] | None = None
    token_env: _Variable = "HF_TOKEN"
    offline: bool = False
    trust_remote_code: bool = False

    @field_validator("cache_dir")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_absolute():
            raise ValueError("must be an absolute path")
        return value


class Switching(Section):
    """Several models on one node. Models that nobody uses sleep when another one needs their memory, and wake when they
    are asked for.

    `on_request`: what a request for a model that is known and not loaded does: load it, or be refused.
    `idle_sleep_s`: after so many seconds without a request a model sleeps; null = only when its memory is needed.
    `switch_after_s`: how long a model waits for one that is busy, when it cannot run beside it, before that one has to
    come to an end and sleep.
    """

    on_request: Literal["load", "refuse"] = "refuse"
    idle_sleep_s: float | None = Field(None, gt=0)
    switch_after_s: float = Field(10, ge=0)


class AppConfig(Section):
    """`args:` of `raytier.serve:build_app`.

    `models`, `registry`: the models that may be served, here or in a file (`raytier.sources.registry`); one of the two.
    `loaders`: loaders of further source types: type -> module:Class (`raytier.sources.loader`).
    `startup_model`: loaded when the application starts; auto = the first one, null = none until a load request.
    """

    models: tuple[ModelEntry, ...] = ()
    registry: str | None = None
    loaders: Mapping[str, Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]] = Field(default_factory=dict)
    startup_model: str | None = "auto"
    switching: Switching = Switching()
    tiers: Tiers = Tiers()
    precision: PrecisionSection = PrecisionSection()
    compression: CompressionSection = CompressionSection()
    placement: Placement = Placement()
    prefetch: Prefetch = Prefetch()
    kv: KVCache = KVCache()
    scheduler: Scheduler = Scheduler()
    compute: Compute = Compute()
    api: ApiSection = ApiSection()
    huggingface: HuggingFace = HuggingFace()
    cache_dir: str = Field(default_factory=lambda: os.path.expanduser("~/.cache/raytier"))
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("registry")
    @classmethod
    def _from_here(cls, value: str | None) -> str | None:
        return None if value is None else os.path.abspath(value)  # other processes have other working directories

    @model_validator(mode="after")
    def _some_models(self) -> AppConfig:
        names = [m.model_id for m in self.models]
        if len(set(names)) != len(names):
            raise ValueError(f"models: duplicate model_id in {names}")
        if bool(names) == (self.registry is not None):
            raise ValueError("give either models, with at least one of them, or registry, the path of a models.yaml")
        if self.registry is None and self.startup_model not in (None, "auto", *names):
            raise ValueError(f"startup_model: {self.startup_model!r} is not one of {names}")
        return self

    def converts(self, tier: Literal["ramdisk", "nvme"]) -> bool:
        """Whether files of a tier may hold parameters in another form than the checkpoint, or coded."""
        return bool(self.precision.wishes(tier) - {"source"}) or self.compression.of(tier) != "none"


def parse_config(args: Mapping[str, Any]) -> AppConfig:
    """Validate `args`.

    Raises:
        ConfigurationError: one line per problem: field, value, what is wrong.
    """
    try:
        return AppConfig.model_validate(dict(args))
    except ValidationError as error:
        problems = explain(error, AppConfig)
        raise ConfigurationError("Configuration is not valid:\n  " + "\n  ".join(problems)) from None
