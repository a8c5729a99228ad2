"""API keys: who may call, and who may change what is loaded.

Keys are compared by their SHA-256, in constant time; neither they nor what a client sends is ever logged or shown.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from raytier.config import ApiSection, KeySource
from raytier.errors import AccessError, ConfigurationError

#: What anybody may ask: probes, scrapers and browsers send no keys, and get nothing of a user's here.
_OPEN = frozenset({"/health", "/version", "/metrics", "/api/docs", "/api/redoc", "/api/openapi.json"})
#: What changes where models are.
_ADMIN = frozenset(
    {f"/api/models/{operation}" for operation in ("load", "unload", "sleep", "wake", "register")}
    | {"/api/layers/transfer"}
)


class Keys:
    """The keys of an application; no keys of a kind: that kind is not asked for.

    Args:
        api: let a client call.
        admin: let it load, unload, register and move models too. Without these, an API key does.
    """

    def __init__(self, api: Iterable[str] = (), admin: Iterable[str] = ()) -> None:
        self._api = [_digest(key) for key in api]
        self._admin = [_digest(key) for key in admin]

    def __repr__(self) -> str:
        return f"Keys({len(self._api)} for calls, {len(self._admin)} for administration)"

    @classmethod
    def of(cls, section: ApiSection) -> Keys:
        """As the configuration says where they are.

        Raises:
            ConfigurationError: a file or a variable that it names has none.
        """
        return cls(read_keys(section.key, "api.key"), read_keys(section.admin_key, "api.admin_key"))

    def check(self, method: str, path: str, given: str | None) -> None:
        """Whether a request with the key `given` may pass.

        Raises:
            AccessError: 401 without a key, 403 with a wrong one.
        """
        if path in _OPEN or method == "OPTIONS":
            return
        admin = method == "POST" and path in _ADMIN
        # An administrator may call, too.
        allowed = (self._admin or self._api) if admin else [*self._api, *self._admin] if self._api else []
        if not allowed:
            return
        what = f"{method} {path} needs {'the admin key' if admin and self._admin else 'an API key'}"
        if not given:
            raise AccessError(f"{what}: send it as X-API-Key, or as Authorization: Bearer", missing=True)
        digest = _digest(given)
        # All of them are compared, so that time tells nothing.
        if not sum(hmac.compare_digest(digest, each) for each in allowed):
            raise AccessError(f"{what}, and the one that was sent is not it", missing=False)


class KeyGuard:
    """Lets pass what `keys` allow. Pure ASGI, for the reason that `RequestScope` gives."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._keys.check(scope["method"], route_path(scope), _given(Headers(scope=scope)))
        await self._app(scope, receive, send)


def route_path(scope: Scope) -> str:
    """Path of a request within the application: without the prefix under which it is served."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return (path.removeprefix(root) if path.startswith(f"{root}/") else path).rstrip("/")


def _given(headers: Headers) -> str | None:
    if (key := headers.get("x-api-key")) is not None:
        return key.strip()
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(source: KeySource, where: str) -> list[str]:
    """Keys of a file or a variable, divided by white space."""
    if source.file is not None:
        try:
            keys = Path(source.file).read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ConfigurationError(f"{where}.file: {source.file} cannot be read: {reason}") from None
        if not keys:
            raise ConfigurationError(f"{where}.file: {source.file} holds no key; write one per line")
        return keys
    keys = os.environ.get(source.env, "").split()
    # A name that somebody wrote down is meant to protect: without a key the server would be open.
    if not keys and "env" in source.model_fields_set:
        raise ConfigurationError(f"{where}.env: the environment of the replica has no {source.env}, or it is empty")
    return keys
