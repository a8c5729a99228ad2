"""`serve run FILE` with a Ray of its own: it comes up, answers, and Ctrl-C ends all of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from openai import OpenAI

from tests.integration.application import eventually, ours

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
MARK = "RAYTIER_TEST_SESSION"


def processes(session: str) -> list[str]:
    """Processes that carry the mark of `session` in their environment, as every child of a child does."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def with_address(config: Path, port: int, cache_dir: str, target: Path) -> Path:
    """A shipped configuration, on another port and with the tests' own cache."""
    content = yaml.safe_load(config.read_text())
    content["http_options"]["port"] = port
    content["applications"][0]["args"]["cache_dir"] = cache_dir
    target.write_text(yaml.safe_dump(content))
    return target


@contextmanager
def serve_run(config: Path, temp: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """`serve run` in a session of its own, as from a terminal; the process, its mark and its output."""
    session, output = uuid.uuid4().hex, temp / "output"
    command = [str(Path(sys.executable).with_name("serve")), "run", str(config)]
    environment = {**os.environ, MARK: session, "TMPDIR": str(temp), "RAY_TMPDIR": str(temp)}
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell starts what runs in the background with SIGINT ignored, and so would this one begin.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        yield process, session, output
    finally:
        if process.poll() is None:  # only where the test failed
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                for line in processes(session):
                    os.kill(int(line.partition(":")[0]), signal.SIGKILL)
                process.wait()


def test_it_comes_up_answers_and_ends(short_tmp: Path, tmp_path: Path, cache_dir: str, free_port: int) -> None:
    config = with_address(ROOT / "serve_configs/llm-streamed.yaml", free_port, cache_dir, tmp_path / "serve.yaml")
    before = set(os.listdir("/dev/shm"))
    url = f"http://127.0.0.1:{free_port}"
    with serve_run(config, short_tmp) as (process, session, output):

        def up() -> bool:
            text = output.read_text(errors="replace")
            assert process.poll() is None and "DEPLOY_FAILED" not in text, text
            try:
                return httpx.get(f"{url}/health", timeout=5).status_code == 200
            except httpx.HTTPError:
                return False

        eventually(up, seconds=150, every=0.2)
        with OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0, timeout=60) as client:
            parts = client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "Who are you?"}], max_tokens=20, stream=True
            )
            assert any(part.choices[0].finish_reason for part in parts)
        assert len(processes(session)) > 8

        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) is not None
        eventually(lambda: not processes(session), seconds=30)

    text = output.read_text(errors="replace")
    assert "Traceback" not in text, text
    left = {name for name in set(os.listdir("/dev/shm")) - before if re.search("raytier|plasma", name)}
    assert not left
    assert ours(short_tmp) == {"ray", "output"}, "only logs stay"
