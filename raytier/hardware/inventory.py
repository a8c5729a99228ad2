"""What is on this node: CPUs, RAM and its cgroup limit, disks, GPUs. No torch, no Ray.

Memory comes from `/proc` and `/sys/fs/cgroup` (both cgroup versions), so that a container's limit counts;
GPUs come from `nvidia-smi`, so that the processes that only plan need no CUDA context.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from raytier.errors import ConfigurationError

logger = logging.getLogger(__name__)

MIB = 2**20
T = TypeVar("T")
Bytes = Annotated[int, Field(ge=0)]

#: A memory cgroup without a limit reads as "max" (v2) or as a number near 2**63 (v1).
_NO_LIMIT = 2**62
#: Where Ray's memory monitor starts to kill unless RAY_memory_usage_threshold says otherwise.
_RAY_THRESHOLD = 0.95
#: Instruction sets that decide how fast linear layers are, as the kernel names them (x86 and Arm).
_INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_vbmi2",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)
_SMI_FIELDS = "index,uuid,name,memory.total,memory.free,compute_cap"


@dataclass(frozen=True, slots=True)
class GPU:
    """A CUDA device. `index` counts the visible ones, as torch does; `compute_capability` like "9.0"."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    index: Annotated[int, Field(ge=0)]
    name: str
    total_bytes: Bytes
    free_bytes: Bytes
    compute_capability: str = ""


@dataclass(frozen=True, slots=True)
class Disk:
    """The filesystem that holds `path`, which need not exist yet. Sizes in bytes; free = what an unprivileged process
    may use.

    Attributes:
        device: the same for paths that share their free space; "" where unknown.
        direct_io: whether files there can bypass the page cache; None where that could not be tried.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: str
    filesystem: str
    free_bytes: Bytes
    total_bytes: Bytes
    device: str = ""
    direct_io: bool | None = None


@dataclass(frozen=True, slots=True)
class NodeInventory:
    """One node (spec A1). Sizes in bytes.

    Attributes:
        cpus: CPUs that this process may run on.
        ram_total: physical memory.
        ram_available: what can still be used without swapping and within every cgroup limit.
        cgroup_limit: smallest memory limit on this process that is below `ram_total`, or None.
        shm_free: free bytes of `/dev/shm`.
        instruction_sets: those of the CPU that matter for linear layers.
        huge_pages: mode of transparent huge pages (always, madvise, never); "" where unknown.
        memory_threshold: share of `memory_limit` in use above which Ray's memory monitor kills workers; 1 without it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    hostname: str
    cpus: Annotated[int, Field(ge=1)]
    ram_total: Annotated[int, Field(gt=0)]
    ram_available: Bytes
    cgroup_limit: Bytes | None = None
    shm_free: Bytes = 0
    disks: tuple[Disk, ...] = ()
    gpus: tuple[GPU, ...] = ()
    instruction_sets: tuple[str, ...] = ()
    huge_pages: str = ""
    memory_threshold: Annotated[float, Field(gt=0, le=1)] = _RAY_THRESHOLD

    def disk(self, path: str) -> Disk | None:
        """The disk entry of `path`, None when it was not asked for."""
        return next((disk for disk in self.disks if disk.path == path), None)

    @property
    def memory_limit(self) -> int:
        """Bytes that may be in use before the kernel (or Ray's memory monitor) acts."""
        return self.ram_total if self.cgroup_limit is None else min(self.ram_total, self.cgroup_limit)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> NodeInventory:
        """Raises ConfigurationError that names the bad field."""
        return validate(cls, parse_json(text, "inventory"), "inventory")


def take_inventory(disk_paths: Iterable[str] = (), *, root: str = "/") -> NodeInventory:
    """Look at this node.

    Args:
        disk_paths: files or directories; each is reported with the filesystem that it lies on, or will lie on.
        root: where `proc`, `sys` and `dev` are found (tests pass a tree of their own).
    """
    base = Path(root)
    ram_total, available = _meminfo(base / "proc/meminfo")
    limit: int | None = None
    for level_limit, level_used in _cgroup_levels(base):
        if level_limit >= ram_total:
            continue
        limit = level_limit if limit is None else min(limit, level_limit)
        available = min(available, max(0, level_limit - level_used))
    shm = base / "dev/shm"
    return NodeInventory(
        hostname=socket.gethostname(),
        cpus=len(os.sched_getaffinity(0)),
        ram_total=ram_total,
        ram_available=available,
        cgroup_limit=limit,
        shm_free=shutil.disk_usage(shm).free if shm.is_dir() else 0,
        disks=tuple(_disk(path, base) for path in dict.fromkeys(disk_paths)),
        gpus=_gpus(os.environ),
        instruction_sets=_instruction_sets(base / "proc/cpuinfo"),
        huge_pages=_huge_pages(base / "sys/kernel/mm/transparent_hugepage/enabled"),
        memory_threshold=_memory_threshold(os.environ),
    )


def nearest_existing(path: str) -> str:
    """`path`, or the nearest directory above it that exists: where a tier's directory will be made."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    return str(place)


def validate(cls: type[T], value: Any, where: str) -> T:
    """Build a dataclass from decoded JSON; ConfigurationError names every bad field as `where.field`."""
    try:
        return TypeAdapter(cls).validate_python(value)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ".".join([where, *(str(part) for part in item["loc"])])
            if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                lines.append(f"{name}: unknown field")
            elif item["type"] in ("missing", "missing_argument"):
                lines.append(f"{name}: required, not given")
            else:
                lines.append(f"{name}: {item['msg'].removeprefix('Value error, ')} (value {item['input']!r})")
        raise ConfigurationError("Machine description is not valid:\n  " + "\n  ".join(lines)) from None


def parse_json(text: str, where: str) -> Any:
    """`json.loads` with a ConfigurationError that names line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{where} is not JSON: {error}") from None


def _meminfo(path: Path) -> tuple[int, int]:
    """MemTotal and MemAvailable in bytes."""
    values = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable", "MemFree"):
            values[name] = int(rest.split()[0]) * 1024
    return values["MemTotal"], values.get("MemAvailable", values["MemFree"])


def _cgroup_levels(base: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be reclaimed) of every memory cgroup above this process.

    A limit of any ancestor binds, so all of them are walked. Page cache on the file LRU lists is left out of
    the usage: the kernel drops it before it kills. tmpfs and memfd pages lie on the anonymous lists and count.
    """
    try:
        lines = (base / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = base / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" and (mount / "cgroup.controllers").exists():
            for level in _ancestors(mount, path):
                limits = [_read_int(level / name) for name in ("memory.max", "memory.high")]
                yield from _level(level, limits, "memory.current", ("active_file", "inactive_file"))
        elif "memory" in controllers.split(","):
            for level in _ancestors(mount / "memory", path):
                limits = [_read_int(level / "memory.limit_in_bytes")]
                names = ("total_active_file", "total_inactive_file")
                yield from _level(level, limits, "memory.usage_in_bytes", names)


def _ancestors(mount: Path, path: str) -> Iterator[Path]:
    """The cgroup directory and its parents up to the mount. In a container without a cgroup namespace
    `path` is the host's and does not exist below the mount; its last existing ancestor, the mount, does."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    for depth in range(len(parts), -1, -1):
        level = mount.joinpath(*parts[:depth])
        if level.is_dir():
            yield level


def _level(level: Path, limits: list[int | None], usage: str, cache: tuple[str, str]) -> Iterator[tuple[int, int]]:
    limit = min((value for value in limits if value is not None and value < _NO_LIMIT), default=None)
    used = _read_int(level / usage)
    if limit is None or used is None:
        return
    try:
        stat = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        stat = {}
    yield limit, max(0, used - sum(int(stat.get(name, 0)) for name in cache))


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent at the root cgroup, or "max"
        return None


def _disk(path: str, base: Path) -> Disk:
    real = Path(os.path.realpath(nearest_existing(path)))
    best, filesystem = Path("/"), "unknown"
    for line in (base / "proc/self/mounts").read_text().splitlines():
        _, point, kind = line.split()[:3]
        mount = Path(point.replace("\\040", " "))  # how /proc writes a space
        if (real == mount or mount in real.parents) and len(mount.parts) >= len(best.parts):
            best, filesystem = mount, kind
    usage = shutil.disk_usage(real)
    return Disk(path, filesystem, usage.free, usage.total, str(os.stat(real).st_dev), _direct_io(real))


def _direct_io(place: Path) -> bool | None:
    """Whether O_DIRECT works at `place`: tried on the file itself, or on one without a name in the directory."""
    flags = os.O_RDONLY if place.is_file() else os.O_RDWR | os.O_TMPFILE
    try:
        os.close(os.open(place, flags | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EINVAL:  # no right to write there, or a filesystem without nameless files
            return None
        return False
    return True


def _instruction_sets(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return ()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").partition(":")[2].split()
    return tuple(name for name in _INSTRUCTION_SETS if name in flags)


def _memory_threshold(environ: Mapping[str, str]) -> float:
    """As Ray's daemons read it, if they were started with the same environment."""
    if environ.get("RAY_memory_monitor_refresh_ms") == "0":
        return 1.0
    try:
        value = float(environ["RAY_memory_usage_threshold"])
    except (KeyError, ValueError):
        return _RAY_THRESHOLD
    return value if 0 < value <= 1 else _RAY_THRESHOLD


def _huge_pages(path: Path) -> str:
    """The mode in brackets of "always [madvise] never"."""
    try:
        return next((word.strip("[]") for word in path.read_text().split() if word.startswith("[")), "")
    except OSError:
        return ""


def _gpus(environ: Mapping[str, str]) -> tuple[GPU, ...]:
    """Visible NVIDIA GPUs; none when there is no working `nvidia-smi`."""
    binary = shutil.which("nvidia-smi")
    if binary is None:
        return ()
    command = [binary, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nvidia-smi failed, planning without GPUs: %s", error)
        return ()
    return _parse_smi(done.stdout, environ.get("CUDA_VISIBLE_DEVICES"))


def _parse_smi(text: str, visible: str | None) -> tuple[GPU, ...]:
    """GPUs of nvidia-smi's CSV (memory in MiB), in the order and with the numbers that
    CUDA_VISIBLE_DEVICES (`visible`) gives them: indices or UUID prefixes; the first unknown one ends the list."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    rows = [row for row in rows if len(row) == len(_SMI_FIELDS.split(","))]
    if visible is not None:
        chosen = []
        for key in (key.strip() for key in visible.split(",")):
            match = [row for row in rows if row[0] == key or (key.startswith("GPU-") and row[1].startswith(key))]
            if not match:
                break
            chosen.append(match[0])
        rows = chosen
    gpus: list[GPU] = []
    for row in rows:
        try:
            total, free = int(row[3]) * MIB, int(row[4]) * MIB
        except ValueError:  # "[N/A]": a GPU split by MIG, or one with unified memory
            logger.warning("nvidia-smi reports no memory size for GPU %s (%s); it is not used", row[0], row[2])
            continue
        gpus.append(GPU(len(gpus), row[2], total, free, row[5]))
    return tuple(gpus)
