"""Where every tensor of a safetensors checkpoint lies, read from the headers alone.

The files come from anywhere, so every number in them is checked before it is used: a manifest made
from this index never points outside of a file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

from raytier.checkpoint.manifest import SourceFile
from raytier.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

#: The format's own limit of a header (safetensors refuses to read more).
MAX_HEADER_BYTES = 100 * 2**20
#: An index names each tensor once; the largest published ones are below 20 MB.
MAX_INDEX_BYTES = 100 * 2**20

#: Far above any model's; bounds the work that a hostile header can ask for.
_MAX_DIMS = 32

#: safetensors dtype -> torch's name, for the dtypes that raytier knows.
_DTYPE_NAMES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "BOOL": "bool",
}
#: Bytes per element of every dtype with whole bytes, to check a tensor's extent against its shape.
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "BOOL": 1} | {
    "F64": 8,
    "U64": 8,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor: `nbytes` bytes at `offset` of `CheckpointIndex.files[file]`, row-major, little-endian.

    `dtype` is torch's name (`bfloat16`), or the format's own (`F8_E4M3`) where raytier does not know it.
    """

    file: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a checkpoint by their stored name, in the order of the files."""

    tensors: dict[str, TensorEntry]
    files: tuple[SourceFile, ...]


def read_index(model_dir: str) -> CheckpointIndex:
    """Read the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Where both exist the single file is taken, as transformers does.

    Raises:
        CheckpointError: a file is missing, truncated, longer than its header says, not safetensors, names a
            tensor twice, or lies outside of `model_dir`.
    """
    root = os.path.abspath(model_dir)
    if not os.path.isdir(root):
        raise CheckpointError(f"{root}: no such directory; give the directory that holds config.json")
    if not has_weights(root):
        raise CheckpointError(_nothing_to_read(root))
    return collect(root, SINGLE_FILE, INDEX_FILE, _read_file)


def has_weights(model_dir: str) -> bool:
    """Whether there is a safetensors checkpoint, complete or not."""
    return any(os.path.exists(os.path.join(model_dir, name)) for name in (SINGLE_FILE, INDEX_FILE))


def collect(
    root: str, single: str, index: str, read_file: Callable[[str, int], tuple[dict[str, TensorEntry], int]]
) -> CheckpointIndex:
    """The tensors of `single`, or of the shards that `index` names, one of which exists.

    Args:
        read_file: (path, number of the file) -> its tensors and its size in bytes.

    Raises:
        CheckpointError: as `read_index`.
    """
    expected: dict[str, str] = {}
    if os.path.exists(os.path.join(root, single)):
        shards = [single]
    else:
        shards, expected = _read_shard_index(root, index)

    files: list[SourceFile] = []
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        path = os.path.join(root, shard)
        entries, size = read_file(path, len(files))
        files.append(SourceFile(path, size))
        for name, entry in entries.items():
            if name in tensors:
                first = os.path.basename(files[tensors[name].file].path)
                raise CheckpointError(f"{root}: tensor {name!r} is in both {first} and {shard}; keep one of them")
            tensors[name] = entry
    for name, shard in expected.items():
        found = tensors.get(name)
        if found is None or files[found.file].path != os.path.join(root, shard):
            where = "is in no shard" if found is None else f"is in {os.path.basename(files[found.file].path)}"
            raise CheckpointError(
                f"{os.path.join(root, index)}: says that {name!r} is in {shard}, but it {where}; "
                "the index and the shards belong to different checkpoints: copy them again"
            )
    return CheckpointIndex(tensors, tuple(files))


def load_json(path: str, max_bytes: int = MAX_INDEX_BYTES) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        CheckpointError: unreadable, larger than `max_bytes`, or not a JSON object.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: more than {max_bytes} bytes; this is not a model's JSON file")
    return _parse_object(data, path)


def _parse_object(data: bytes, what: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise ValueError(f"key {name!r} twice")
            result[name] = value
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{what}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: a JSON object is needed, found {type(value).__name__}")
    return value


def _read_shard_index(root: str, index: str) -> tuple[list[str], dict[str, str]]:
    """Shards in sorted order, and the tensor -> shard map of the index file."""
    path = os.path.join(root, index)
    weight_map = load_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no `weight_map` object that names a shard for every tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise CheckpointError(
                f"{path}: tensor {name!r} names the shard {shard!r}; a shard is a file inside the model directory"
            )
    shards = sorted(set(weight_map.values()))
    missing = [s for s in shards if not os.path.exists(os.path.join(root, s))]
    if missing:
        raise CheckpointError(
            f"{root}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; complete the download"
        )
    return shards, weight_map


def _stays_inside(shard: str) -> bool:
    # Lexical on purpose: the Hugging Face cache holds its shards as symbolic links that leave the directory.
    if not shard or "\0" in shard or "\\" in shard or os.path.isabs(shard):
        return False
    return all(part not in ("", ".", "..") for part in shard.split("/"))


def _read_file(path: str, file: int) -> tuple[dict[str, TensorEntry], int]:
    """Tensors of one file and its size in bytes; `file` is its index in the checkpoint."""
    try:
        check_regular(path)
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            header, header_bytes = _read_header(handle, path, size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None

    data_start = 8 + header_bytes
    entries: dict[str, TensorEntry] = {}
    for name, value in header.items():
        if name != "__metadata__":
            entries[name] = _parse_entry(path, name, value, file, data_start)

    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset < end:
            raise CheckpointError(f"{path}: the bytes of {name!r} overlap those of another tensor; the file is damaged")
        end = entry.offset + entry.nbytes
    if size != end:
        kind = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(f"{path}: {kind}: {end} bytes expected, {size} found; download the file again")
    return entries, size


def check_regular(path: str) -> None:
    """Refuse what would block or never end: a FIFO, a device. Raises CheckpointError, OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError(f"{path}: not a regular file")


def _read_header(handle: BinaryIO, path: str, size: int) -> tuple[dict[str, Any], int]:
    prefix = handle.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: truncated: at least 8 bytes expected, {size} found; download the file again")
    nbytes = int.from_bytes(prefix, "little")
    if nbytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header of {nbytes} bytes, at most {MAX_HEADER_BYTES} are allowed; this is not a safetensors file"
        )
    if 8 + nbytes > size:
        raise CheckpointError(
            f"{path}: truncated: at least {8 + nbytes} bytes expected, {size} found; download the file again"
        )
    return _parse_object(handle.read(nbytes), f"{path}: safetensors header"), nbytes


def _parse_entry(path: str, name: str, value: object, file: int, data_start: int) -> TensorEntry:
    def bad(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: header entry {name!r}: {reason}; the file is damaged")

    if not isinstance(value, dict):
        raise bad("not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str):
        raise bad(f"dtype {dtype!r}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(_is_size(n) for n in shape):
        raise bad(f"shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise bad(f"data_offsets {offsets!r}")
    start, stop = offsets
    nbytes = stop - start
    item = _ITEM_BYTES.get(dtype)
    if nbytes < 0 or (item is not None and nbytes != prod(shape) * item):
        raise bad(f"data_offsets {offsets!r} do not hold a {dtype} tensor of shape {shape!r}")
    return TensorEntry(file, data_start + start, nbytes, _DTYPE_NAMES.get(dtype, dtype), tuple(shape))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _nothing_to_read(root: str) -> str:
    names = sorted(os.listdir(root))
    wanted = f"{SINGLE_FILE} or {INDEX_FILE}"
    loose = [n for n in names if n.endswith(".safetensors")]
    torch = [n for n in names if n.startswith("pytorch_model") and n.endswith((".bin", ".bin.index.json"))]
    other = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".gguf", ".onnx", ".ckpt", ".msgpack", ".h5"))]
    if loose:
        return f"{root}: {wanted} is needed, found only {', '.join(loose[:5])}; the index file is missing"
    if torch:
        found = ", ".join(torch[:5])
        return f"{root}: {wanted} is needed, found {found}; to read those, set model_format: transformers_pt"
    if any(n.endswith((".gguf", ".onnx")) for n in other):
        return (
            f"{root}: GGUF and ONNX files are not read, found {', '.join(other[:5])}; nearest supported: the "
            "checkpoint that they were made from, with safetensors"
        )
    if other:
        return (
            f"{root}: {wanted} is needed, found only {', '.join(other[:5])}; raytier reads safetensors: "
            "convert with transformers (`from_pretrained(...).save_pretrained(...)`)"
        )
    return f"{root}: no weights: {wanted} is needed"
