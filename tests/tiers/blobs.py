"""Small filesystems, and checkpoints of random bytes: fixtures, imported by the conftest files that need them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from raytier.checkpoint.manifest import Extent, KVLayerSpec, ModelManifest, Parameter, Role, SourceFile
from raytier.errors import ConfigurationError
from raytier.tiers.copies import TierCopy
from raytier.tiers.ramdisk import Ramdisk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Directories on filesystems of their own, of a given size in bytes: tmpfs, mounted for the test."""
    with ExitStack() as stack:
        made = 0

        def make(nbytes: int) -> Path:
            nonlocal made
            made += 1
            path = tmp_path / f"disk{made}"
            try:
                stack.enter_context(Ramdisk(str(path), nbytes, mount=True))
            except ConfigurationError as error:
                pytest.skip(f"needs the right to mount: {error}")
            return path

        yield make


class Blob:
    """A checkpoint of random bytes, and parameters cut out of it."""

    def __init__(self, directory: Path, sizes: Sequence[int] = (300_001, 70_000), seed: int = 0) -> None:
        draw = random.Random(seed)
        self.data = [draw.randbytes(size) for size in sizes]
        self.files = tuple(SourceFile(str(directory / f"{n}.safetensors"), size) for n, size in enumerate(sizes))
        for file, data in zip(self.files, self.data, strict=True):
            Path(file.path).write_bytes(data)

    def parameter(self, name: str, *extents: tuple[int, int, int]) -> Parameter:
        """A parameter of bytes (its dtype is `bool`) that is the concatenation of (file, offset, bytes)."""
        return Parameter(
            name,
            (sum(nbytes for _, _, nbytes in extents),),
            "bool",
            Role.OTHER,
            extents=tuple(Extent(*extent) for extent in extents),
        )

    def content(self, parameter: Parameter) -> bytes:
        return b"".join(self.data[e.file][e.offset : e.offset + e.nbytes] for e in parameter.extents)

    def manifest(self, *parameters: Parameter) -> ModelManifest:
        """As little around `parameters` as a manifest can have."""
        return ModelManifest(
            model_dir=str(Path(self.files[0].path).parent),
            architecture="Bytes",
            model_type="bytes",
            files=self.files,
            parameters=parameters,
            num_layers=1,
            hidden_size=1,
            vocab_size=1,
            max_context=1,
            compute_dtype="float32",
            kv_layers=(KVLayerSpec(1, 1, 1),),
            embedding=parameters[0].name,
            head=parameters[0].name,
        )


@pytest.fixture
def blob(tmp_path: Path) -> Blob:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    return Blob(directory)


def read_copy(copy: TierCopy) -> bytes:
    """The bytes of a copy, read plainly; every file must have the size that it says."""
    contents = [Path(file.path).read_bytes() for file in copy.files]
    assert [len(content) for content in contents] == [file.size for file in copy.files]
    return b"".join(contents[e.file][e.offset : e.offset + e.nbytes] for e in copy.stored.extents)
