"""Where every tensor of PyTorch's .bin files lies, so that they are read in place as safetensors are.

A file of `torch.save` is a zip archive whose members are stored plain: a pickle that says what there is, and the bytes
of each storage. The pickle is read by torch's `weights_only` loader, which makes tensors and nothing else, under
FakeTensorMode, in which it notes where a storage begins instead of reading it (`UntypedStorage._checkpoint_offset`,
https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from raytier.checkpoint.safetensors_index import CheckpointIndex, TensorEntry, check_regular, collect
from raytier.errors import CheckpointError

SINGLE_FILE = "pytorch_model.bin"
INDEX_FILE = "pytorch_model.bin.index.json"
_CONVERT = "convert it with transformers (`from_pretrained(...).save_pretrained(...)`, which writes safetensors)"


def read_torch_index(model_dir: str) -> CheckpointIndex:
    """The tensors of `pytorch_model.bin`, or of the shards that `pytorch_model.bin.index.json` names.

    Raises:
        CheckpointError: a file is missing or damaged, holds anything but tensors, or has them in a form that cannot be
            read in place.
    """
    root = os.path.abspath(model_dir)
    if not any(os.path.exists(os.path.join(root, name)) for name in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(f"{root}: no weights: model.safetensors or {SINGLE_FILE}, or shards of them, are needed")
    return collect(root, SINGLE_FILE, INDEX_FILE, _read_file)


def _read_file(path: str, file: int) -> tuple[dict[str, TensorEntry], int]:
    try:
        check_regular(path)
        size = os.stat(path).st_size
        plain = zipfile.is_zipfile(path)
        if plain:
            with zipfile.ZipFile(path) as archive:
                plain = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # of a damaged archive
        raise CheckpointError(f"{path}: damaged: {error}; download it again") from None
    if not plain:
        raise CheckpointError(
            f"{path}: not a file that torch.save has written since version 1.6, or damaged; download it again, or "
            f"{_CONVERT}"
        )
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(
            f"{path}: it holds more than tensors, and nothing else is loaded from it (weights_only): {reason}; "
            f"{_CONVERT}"
        ) from None
    except Exception as error:  # readers of a damaged archive raise what they like
        raise CheckpointError(f"{path}: damaged: {' '.join(str(error).split())[:200]}; download it again") from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{path}: a dictionary of tensors is needed, found {type(content).__name__}; {_CONVERT}")
    return {name: _entry(path, name, value, file, size) for name, value in content.items()}, size


def _entry(path: str, name: str, value: object, file: int, size: int) -> TensorEntry:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{path}: {name!r} is no tensor but {type(value).__name__}; {_CONVERT}")
    plain = value.layout is torch.strided and value.is_contiguous()
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None) if plain else None
    if start is None:
        raise CheckpointError(f"{path}: {name!r} is not stored as one piece of plain numbers; {_CONVERT}")
    offset = int(start) + int(value.storage_offset()) * value.element_size()
    nbytes = value.numel() * value.element_size()
    if offset < 0 or offset + nbytes > size:
        raise CheckpointError(f"{path}: {name!r} ends behind the end of the file; download it again")
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorEntry(file, offset, nbytes, dtype, tuple(int(n) for n in value.shape))
