"""Models of the Hugging Face hub: fetched into Hugging Face's own cache by `huggingface_hub`, only what is needed.

A download that ends half-way goes on where it stopped when it is asked for again: finished files are in the cache, and
of a large file what has come is kept beside them (`huggingface_hub` 2 begins such files again, hence `_resume`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytier.config import MIB, AppConfig
from raytier.errors import ConfigurationError, ModelLoadingError, ResourceNotAvailableError
from raytier.model_entry import ModelEntry
from raytier.sources.hub_files import needed_files
from raytier.sources.loader import FetchOptions, ModelLoader, Progress

if TYPE_CHECKING:
    from huggingface_hub import ResolvedRevision
    from huggingface_hub.hf_api import RepoFile

logger = logging.getLogger(__name__)

_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
#: Files in flight; a hub gives each connection a share of its rate.
_FILES_AT_ONCE = 4
#: Smaller files begin again when a download is interrupted.
_RESUMED_FROM = 4 * MIB
_HASHED_AT_ONCE = 4 * MIB


class _Cancelled(Exception):
    """Raised in the threads of a download that nobody wants any more."""


class HuggingFaceLoader(ModelLoader):
    """`source_path` is the id of a repository (org/name), `revision` a branch, tag or commit of it.

    The token comes with the load request or from the variable `huggingface.token_env`; it is kept nowhere.
    """

    def __init__(self, config: AppConfig) -> None:
        self._settings = config.huggingface

    def check(self, entry: ModelEntry) -> None:
        if not _REPOSITORY.fullmatch(entry.source_path) or ".." in entry.source_path:
            raise ConfigurationError(
                f"{entry.model_id}: source_path: {entry.source_path!r} is no id of a Hugging Face model: org/name"
            )

    def find(self, entry: ModelEntry) -> str | None:
        from huggingface_hub import HfApi, get_cached_repo_tree, snapshot_download
        from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError, RevisionResolutionError

        self.check(entry)
        cache = self._settings.cache_dir
        try:
            revision = HfApi().resolve_revision(
                entry.source_path, revision=entry.revision, cache_dir=cache, local_files_only=True
            )
            tree = get_cached_repo_tree(entry.source_path, revision=revision, cache_dir=cache)
            wanted = needed_files(entry.source_path, [file.path for file in tree], entry.model_format)
            return snapshot_download(
                entry.source_path,
                revision=revision,
                cache_dir=cache,
                local_files_only=True,
                allow_patterns=[_literal(name) for name in wanted],
                tqdm_class=_bar(lambda _: None),
            )
        except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError, RevisionResolutionError):
            return None

    async def load(self, entry: ModelEntry, progress: Progress, options: FetchOptions) -> str:
        self.check(entry)
        token = options.token or os.environ.get(self._settings.token_env) or None
        download = _Download(entry, self._settings.cache_dir, self._settings.endpoint, token, progress)
        if self._settings.offline:
            found = await asyncio.to_thread(self.find, entry)
            if found is None:
                raise ModelLoadingError(
                    f"{entry.source_path}: revision {entry.revision} is not, or not wholly, in the cache, and "
                    "huggingface.offline is set: fetch it once with huggingface.offline: false"
                )
            return found
        running = asyncio.ensure_future(asyncio.to_thread(self._fetch, entry, download))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            download.cancelled.set()
            await asyncio.wait([running])  # nothing is written any more when this is over
            running.exception()
            raise

    def _fetch(self, entry: ModelEntry, download: _Download) -> str:
        with _in_our_words(entry, self._settings.token_env):
            try:
                return download.run()
            except _Unreachable as error:
                found = self.find(entry)
                if found is None:
                    raise ModelLoadingError(
                        f"{entry.source_path}: the hub cannot be reached ({error}), and the cache does not hold all of "
                        f"revision {entry.revision}: try again, what has come is kept"
                    ) from None
                logger.warning("%s: the hub cannot be reached (%s): taken from the cache", entry.source_path, error)
                return found


class _Unreachable(Exception):
    """The hub does not answer."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a repository. `blob`: its name in the cache; `sha256`: of large files."""

    name: str
    size: int
    blob: str
    sha256: str | None
    by_xet: bool

    @classmethod
    def of(cls, file: RepoFile) -> _File:
        sha256 = file.lfs.sha256 if file.lfs is not None else None
        return cls(file.path, file.size, sha256 or file.blob_id, sha256, file.xet_hash is not None)


class _Download:
    """One fetch of a repository, in threads."""

    def __init__(
        self, entry: ModelEntry, cache_dir: str | None, endpoint: str | None, token: str | None, progress: Progress
    ) -> None:
        from huggingface_hub import HfApi, constants

        self.cancelled = threading.Event()
        self._entry = entry
        self._repository = entry.source_path
        self._token: str | bool | None = token
        self._cache = os.path.abspath(os.path.expanduser(cache_dir or constants.HF_HUB_CACHE))
        self._progress = progress
        self._api = HfApi(endpoint=endpoint, token=token)
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._here = self._total = 0

    def run(self) -> str:
        """Fetch what is missing; the snapshot's directory."""
        from huggingface_hub import snapshot_download

        revision = self._resolve()
        files = self._wanted(revision)
        self._total = sum(file.size for file in files)
        missing = [file for file in files if not self._is_here(file, revision)]
        self._here = self._total - sum(file.size for file in missing)
        self._check_room(missing)
        self._count(0)
        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="hub") as threads:
            running = [threads.submit(self._one, file, revision) for file in missing]
            try:
                for each in running:
                    each.result()
            except BaseException:
                self.cancelled.set()
                raise
        # Everything is there: this writes down which files the snapshot has, for when the hub cannot be asked.
        return snapshot_download(
            self._repository,
            revision=revision,
            cache_dir=self._cache,
            endpoint=self._endpoint,
            token=self._token,
            allow_patterns=[_literal(file.name) for file in files],
            tqdm_class=_bar(lambda _: None),
        )

    def _resolve(self) -> ResolvedRevision:
        import httpx2
        from huggingface_hub.errors import OfflineModeIsEnabled, RevisionResolutionError

        try:
            return self._api.resolve_revision(
                self._repository, revision=self._entry.revision, cache_dir=self._cache, token=self._token
            )
        except (httpx2.ConnectError, httpx2.TimeoutException, OfflineModeIsEnabled, RevisionResolutionError) as error:
            raise _Unreachable(_short(error)) from None

    def _wanted(self, revision: ResolvedRevision) -> list[_File]:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
        from huggingface_hub.hf_api import RepoFile

        try:
            listed = self._api.list_repo_tree(self._repository, recursive=True, revision=revision.resolved)
            found = {file.path: file for file in listed if isinstance(file, RepoFile)}
        except (httpx2.ConnectError, httpx2.TimeoutException, OfflineModeIsEnabled) as error:
            raise _Unreachable(_short(error)) from None
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code >= 500:
                raise _Unreachable(_short(error)) from None
            raise
        names = needed_files(self._repository, found, self._entry.model_format)
        return [_File.of(found[name]) for name in names]

    @property
    def _folder(self) -> str:
        return os.path.join(self._cache, "models--" + self._repository.replace("/", "--"))

    def _blob(self, file: _File) -> str:
        return os.path.join(self._folder, "blobs", file.blob)

    def _is_here(self, file: _File, revision: ResolvedRevision) -> bool:
        snapshot = os.path.join(self._folder, "snapshots", revision.resolved, file.name)
        return os.path.exists(snapshot) or os.path.exists(self._blob(file))

    def _check_room(self, missing: Sequence[_File]) -> None:
        needed = sum(file.size - _size_of(_partial(self._blob(file))) for file in missing)
        if not needed:
            return
        os.makedirs(self._folder, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise ResourceNotAvailableError(
                f"{self._repository}: {needed / MIB:.0f} MB are to be fetched into {self._cache}, where "
                f"{free / MIB:.0f} MB are free: free some space, or set huggingface.cache_dir to another disk"
            )

    def _one(self, file: _File, revision: ResolvedRevision) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.file_download import is_xet_available  # type: ignore[attr-defined]

        if self.cancelled.is_set():
            raise _Cancelled
        plain = not file.by_xet or not is_xet_available()
        if file.sha256 is not None and file.size >= _RESUMED_FROM and plain:
            self._resume(file, revision)
        hf_hub_download(
            self._repository,
            file.name,
            revision=revision,
            cache_dir=self._cache,
            endpoint=self._endpoint,
            token=self._token,
            tqdm_class=_bar(self._count),
        )

    def _resume(self, file: _File, revision: ResolvedRevision) -> None:
        """Bring a large file to its place in the cache; what an earlier call has left of it is not fetched again."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

        blob = self._blob(file)
        partial = _partial(blob)
        lock = os.path.join(self._cache, ".locks", os.path.basename(self._folder), f"{file.blob}.raytier.lock")
        for directory in (os.path.dirname(blob), os.path.dirname(lock)):
            os.makedirs(directory, exist_ok=True)
        with WeakFileLock(lock):
            if os.path.exists(blob):  # another process has been faster
                self._count(file.size)
                return
            if _size_of(partial) > file.size:
                os.unlink(partial)
            came = _size_of(partial)
            with open(partial, "ab") as target:
                self._count(came)
                http_get(
                    hf_hub_url(self._repository, file.name, revision=revision.resolved, endpoint=self._endpoint),
                    target,
                    resume_size=came,
                    headers=build_hf_headers(token=self._token),
                    expected_size=file.size,
                    tqdm_class=_bar(self._count),
                )
            if came and _sha256(partial) != file.sha256:
                os.unlink(partial)
                raise ModelLoadingError(
                    f"{self._repository}: {file.name} does not have the hub's checksum, what was kept of an earlier "
                    "download is removed: load again"
                )
            os.replace(partial, blob)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._here += nbytes
            here = self._here
        self._progress(min(here, self._total), self._total)
        if self.cancelled.is_set():
            raise _Cancelled


def _bar(count: Callable[[int], None]) -> type[Any]:
    """What `huggingface_hub` takes for a progress bar: it tells `count` of bytes and shows nothing."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

    return Bar


def _partial(blob: str) -> str:
    return f"{blob}.raytier-partial"


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _literal(name: str) -> str:
    """A pattern of fnmatch that means this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


@contextmanager
def _in_our_words(entry: ModelEntry, token_env: str) -> Iterator[None]:
    """Errors of the hub as ours, which say what to do and never hold a token."""
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = entry.source_path
    try:
        yield
    except GatedRepoError:
        raise ModelLoadingError(
            f"{name}: access is granted on request: accept its terms on the hub, and give a token with access in "
            f"{token_env} or with the load request"
        ) from None
    except RepositoryNotFoundError:
        raise ModelLoadingError(
            f"{name}: the hub knows no such model, or shows it only to others: check source_path, or give a token in "
            f"{token_env} or with the load request"
        ) from None
    except (RevisionNotFoundError, RemoteEntryNotFoundError):
        raise ModelLoadingError(f"{name}: the hub has no revision {entry.revision!r} of it: check revision") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise ModelLoadingError(f"{name}: the hub answers {status}: load again later, what has come is kept") from None
    except httpx2.HTTPError as error:
        raise ModelLoadingError(
            f"{name}: the connection to the hub broke ({_short(error)}): load again, what has come is kept"
        ) from None
    except OSError as error:
        raise ModelLoadingError(f"{name}: could not be fetched: {_short(error)}") from None


def _short(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
