"""H5: who may call, who may change what is loaded, and that no key is ever shown."""

from __future__ import annotations

import logging
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from raytier.config import ApiSection, parse_config
from raytier.errors import AccessError, ConfigurationError
from raytier.serve.auth import Keys
from raytier.serve.http import build_api
from tests.serve.echo import MODEL, Served

BOTH = Keys(["sesame", "second"], ["root"])
TEXT = "/v1/completions"


@asynccontextmanager
async def client_of(served: Served, keys: Keys) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=build_api(served, keys=keys))
    async with httpx.AsyncClient(transport=transport, base_url="http://raytier") as http:
        yield http


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_a_call_needs_a_key(served: Served) -> None:
    async with client_of(served, BOTH) as http:
        missing = await http.post(TEXT, json={"prompt": "dog"})
        assert (missing.status_code, missing.headers["www-authenticate"]) == (401, "Bearer")
        assert missing.json()["error"]["type"] == "authentication_error"
        assert "X-API-Key" in missing.json()["error"]["message"]
        for wrong in (bearer("sesam"), {"Authorization": b"Bearer sesam\xe9"}, {"X-API-Key": "SESAME"}):
            refused = await http.post(TEXT, json={"prompt": "dog"}, headers=wrong)  # type: ignore[arg-type]
            assert refused.status_code == 403
            assert refused.json()["error"]["type"] == "permission_error"
        for empty in ({"Authorization": "Basic sesame"}, {"Authorization": "Bearer "}, {"X-API-Key": ""}):
            assert (await http.post(TEXT, json={"prompt": "dog"}, headers=empty)).status_code == 401
        for right in (bearer("sesame"), {"authorization": "bearer second"}, {"x-api-key": "sesame"}, bearer("root")):
            assert (await http.post(TEXT, json={"prompt": "dog"}, headers=right)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x", "/api", "/api/status", "/api/layers", "/nowhere", "/"])
async def test_everything_else_is_closed(served: Served, path: str) -> None:
    async with client_of(served, BOTH) as http:
        assert (await http.get(path)).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/api/docs", "/api/openapi.json", "/health/"])
async def test_probes_and_documents_are_open(served: Served, path: str) -> None:
    async with client_of(served, BOTH) as http:
        assert (await http.get(path, follow_redirects=True)).status_code == 200


async def test_the_admin_key_is_for_what_changes_the_models(served: Served) -> None:
    routes: list[tuple[str, dict[str, Any]]] = [
        ("/api/layers/transfer", {"layer_id": 0, "destination_device": "host"}),
        ("/api/models/unload", {}),
        ("/api/models/load", {"model_name_or_path": MODEL}),
    ]
    for path, body in routes:
        async with client_of(served, BOTH) as http:
            assert (await http.post(path, json=body)).status_code == 401
            refused = await http.post(path, json=body, headers=bearer("sesame"))
            assert refused.status_code == 403
            assert "admin key" in refused.json()["error"]["message"]
            assert (await http.post(path, json=body, headers=bearer("root"))).is_success
    async with client_of(served, Keys(["sesame"])) as http:
        assert (await http.post(path, json=body, headers=bearer("sesame"))).is_success
    async with client_of(served, Keys(admin=["root"])) as http:
        assert (await http.get("/v1/models")).status_code == 200, "without API keys anybody calls"
        assert (await http.post(path, json=body)).status_code == 401


async def test_a_prefix_changes_nothing(served: Served) -> None:
    """Serve mounts the application under its route prefix."""
    transport = httpx.ASGITransport(app=build_api(served, keys=BOTH), root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://raytier") as http:
        assert (await http.get("/llm/health")).status_code == 200
        assert (await http.post("/llm/api/models/unload", headers=bearer("sesame"))).status_code == 403
        assert (await http.get("/llm/v1/models")).status_code == 401
        assert (await http.get("/llm/v1/models", headers=bearer("sesame"))).status_code == 200


async def test_no_key_is_shown(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        async with client_of(served, BOTH) as http:
            answers = [await http.get("/v1/models", headers=bearer(key)) for key in ("sesame", "guessed-key", "root")]
    shown = caplog.text + "".join(str(answer.headers) + answer.text for answer in answers) + repr(BOTH)
    assert not any(key in shown for key in ("sesame", "guessed-key", "root"))
    assert repr(BOTH) == "Keys(2 for calls, 1 for administration)"


def section(**api: Any) -> ApiSection:
    return parse_config({"models": [{"model_id": "m", "source_path": "/m"}], "api": api}).api


def test_keys_come_from_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAYTIER_API_KEY", "RAYTIER_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    check: Callable[[str | None], None] = lambda key: Keys.of(section(**config)).check("GET", "/v1/models", key)  # noqa: E731
    config: dict[str, Any] = {}
    check(None)
    monkeypatch.setenv("RAYTIER_API_KEY", "one\ntwo")
    check("two")
    with pytest.raises(AccessError):
        check("three")
    (tmp_path / "keys").write_text("three\n")
    config = {"key": {"file": str(tmp_path / "keys")}}
    check("three")
    with pytest.raises(AccessError):
        check("one")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ({"env": "RAYTIER_NO_SUCH_VARIABLE"}, r"api\.key\.env: .* no RAYTIER_NO_SUCH_VARIABLE"),
        ({"file": "/nowhere/keys"}, r"api\.key\.file: /nowhere/keys cannot be read: No such file"),
        ({"file": "/dev/null"}, r"holds no key"),
    ],
)
def test_a_key_that_is_missing_is_no_open_door(key: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Keys.of(section(key=key))


def test_a_key_cannot_stand_in_the_configuration() -> None:
    with pytest.raises(ConfigurationError, match=r"api\.key: .*"):
        section(key="sesame")
    with pytest.raises(ConfigurationError, match="absolute"):
        section(key={"file": "keys"})


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(AccessError("no", missing=True)))  # noqa: S301
    assert (error.http_status, error.missing, error.message) == (401, True, "no")


@pytest.mark.parametrize(
    ("api", "field"),
    [
        ({"key": "sk-secret"}, "api.key"),
        ({"key": {"file": "sk-secret"}}, "api.key.file"),
        ({"key": {"env": "sk-secret"}}, "api.key.env"),
        ({"keys": ["sk-secret"]}, "api.keys"),
        ({"upstream": {"key": ["sk-secret"]}}, "api.upstream.key"),
        ({"upstream": {"base_url": "http://user:sk-secret@host/v1"}}, "api.upstream.base_url"),
        ({"upstream": {"base_url": "http://host/v1?key=sk-secret"}}, "api.upstream.base_url"),
        ("sk-secret", "api"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_shown(api: Any, field: str) -> None:
    model = {"model_id": "m", "source_path": "/m"}
    with pytest.raises(ConfigurationError) as refused:
        parse_config({"models": [model], "api": api})
    assert f"\n  {field}: " in str(refused.value)
    assert "secret" not in str(refused.value)


def test_an_unknown_section_is_not_shown_either() -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_config({"models": [{"model_id": "m", "source_path": "/m"}], "apis": {"key": "sk-secret"}})
    assert "apis: unknown key; known here: models, " in str(refused.value)
    assert "secret" not in str(refused.value)
