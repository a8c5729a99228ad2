"""One Ray for all of these tests, a rates cache, models, and one application that is served throughout."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.application import Application
from tests.models import _one_thread, save_model, tokenizer_dir

__all__ = ["_one_thread", "tokenizer_dir"]

LARGE_VOCAB = 8192


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the rates of this machine are kept, so that they are measured once and not in the user's own cache."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """100 KB of weights and a long context: a request may run for as long as a test wants."""
    path = save_model(tmp_path_factory.mktemp("models") / "tiny", "llama", tokenizer_dir, max_position_embeddings=8192)
    template = path / "chat_template.jinja"
    template.write_text("{# takes tools, written as <tool_call> #}" + template.read_text())
    return path


@pytest.fixture(scope="session")
def layered_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """30 MB in 20 layers, small enough that two of them fit into a quarter of the whole."""
    path = tmp_path_factory.mktemp("models") / "layered"
    return save_model(
        path,
        "llama",
        tokenizer_dir,
        fill=lambda parameter: parameter.normal_(std=0.3),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=20,
        num_key_value_heads=1,
    )


@pytest.fixture(scope="session")
def large_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """340 MB in 12 layers: large enough to be seen in the memory of a process."""
    path = tmp_path_factory.mktemp("models") / "large"
    return save_model(
        path,
        "llama",
        tokenizer_dir,
        fill=lambda parameter: parameter.normal_(std=0.05),
        vocab_size=LARGE_VOCAB,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A directory for a Ray of its own, whose sockets allow no long paths."""
    with tempfile.TemporaryDirectory(prefix="rt-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@pytest.fixture(scope="session")
def serve_port(ray_session: None) -> int:
    """Serve runs and answers on this port of localhost."""
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    return port


@pytest.fixture(scope="session")
def app_args(tiny_dir: Path, cache_dir: str) -> dict[str, Any]:
    """`args` of an application that has weights in every tier, and a short queue."""
    return {
        "models": [{"model_id": "tiny", "source_path": str(tiny_dir)}],
        "tiers": {"device": {"max_mb": 64}, "host": {"max_mb": 4}, "nvme": {"io_threads": 2}},
        "placement": {"rules": [{"pattern": "down_proj", "tier": "host"}, {"pattern": "up_proj", "tier": "nvme"}]},
        "scheduler": {"max_num_seqs": 16, "max_num_batched_tokens": 64, "max_queue": 16},
        "compute": {"threads": 1},
        "cache_dir": cache_dir,
    }


@pytest.fixture(scope="session")
def served(serve_port: int, app_args: dict[str, Any]) -> Iterator[Application]:
    """The application, once for all tests: whoever breaks it waits until it works again."""
    from ray import serve

    from raytier.serve import build_app

    handle = serve.run(build_app(app_args), name="tiny", route_prefix="/tiny")
    yield Application("tiny", f"http://127.0.0.1:{serve_port}/tiny", handle)
    serve.delete("tiny")
