"""A real file on disk that tests of the readers share, and parameters that lie anywhere in it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from raytier.checkpoint.manifest import SourceFile
from raytier.execution.reader import ReaderPool
from raytier.tiers.files import DirectFile
from tests.models import make_model, tokenizer_dir

__all__ = ["make_model", "tokenizer_dir"]

SIZES = ((3 << 20) + 777, 150_001)


@dataclass(frozen=True)
class Disk:
    """Files with random contents: as the manifest lists them, and their bytes."""

    files: tuple[SourceFile, ...]
    data: tuple[bytes, ...] = field(repr=False)

    @contextmanager
    def pool(self, threads: int, io_bytes: int, **hooks: Callable[..., int]) -> Iterator[ReaderPool]:
        """A pool over the files; `hooks` replace what `DirectFile` calls."""
        with ExitStack() as stack:
            opened = [stack.enter_context(DirectFile(file.path, file.size, **hooks)) for file in self.files]
            yield stack.enter_context(ReaderPool(opened, threads, io_bytes))


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    folder = tmp_path_factory.mktemp("disk")
    data = tuple(os.urandom(size) for size in SIZES)
    for index, content in enumerate(data):
        (folder / f"{index}.safetensors").write_bytes(content)
    files = tuple(SourceFile(str(folder / f"{i}.safetensors"), len(content)) for i, content in enumerate(data))
    return Disk(files, data)


@pytest.fixture
def no_reader_thread_is_left() -> Iterator[None]:
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("raytier-read")]
    assert not left
