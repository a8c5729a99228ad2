"""The repository itself: ready-made applications, commands in the README, what imports what."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ray.serve.schema import ServeDeploySchema

from raytier.config import parse_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "serve_configs").glob("*.yaml"))
SOURCES = sorted((ROOT / "raytier").rglob("*.py"))
MAX_LINES = 450
TABLES = {ROOT / "raytier/demo/about_raytier.py"}  # nothing but data

# Parts whose processes must stay small: importing torch costs 400 MB (D7).
WITHOUT_TORCH = ("actors", "cli", "config", "engine", "errors", "hardware", "kv", "planner", "serve", "tiers")


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_there_are_ready_made_applications() -> None:
    assert {"llm.yaml", "llm-streamed.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_config_is_valid(path: Path) -> None:
    """H1: what is shipped passes Serve's schema and ours."""
    deploy = ServeDeploySchema.model_validate(_read(path))
    assert deploy.applications
    for application in deploy.applications:
        assert application.import_path == "raytier.serve:build_app"
        parse_config(application.args)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_config_binds_to_localhost(path: Path) -> None:
    """H5: whoever wants to be reached from elsewhere says so."""
    assert _read(path)["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_make_finds_the_port_of_the_config(path: Path) -> None:
    """The Makefile reads and replaces this line with sed."""
    found = re.findall(r"^  port: *(.*)$", path.read_text(), flags=re.MULTILINE)
    assert found == [str(_read(path)["http_options"]["port"])]


@pytest.mark.parametrize("path", sorted({*SOURCES} - TABLES), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_not_too_long(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, (
        f"{path.relative_to(ROOT)} has {lines} lines, at most {MAX_LINES}: is it still one thing?"
    )


def _commands(readme: str) -> list[str]:
    """Lines of fenced blocks and single code spans."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", readme)
    return [line.strip().removeprefix("$ ") for block in [*blocks, *spans] for line in block.splitlines()]


def test_readme_names_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        word
        for command in _commands((ROOT / "README.md").read_text())
        for arguments in re.findall(r"(?:^|&& |; )make\s+([^#&;|]*)", command)
        for word in arguments.split()
        if re.fullmatch(r"[a-z][\w-]*", word)
    }
    assert named, "the README names no make command"
    assert named <= targets, f"the README names make targets that do not exist: {sorted(named - targets)}"


def test_readme_names_files_that_exist() -> None:
    named = set(re.findall(r"\b(?:serve_configs|benchmarks|notebooks)/[\w./-]*\w", (ROOT / "README.md").read_text()))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"the README names files that do not exist: {missing}"


def test_imports_are_declared() -> None:
    """Whoever installs raytier gets everything that it imports."""
    # A TOML list of strings is a Python list of strings, and Python 3.10 has no TOML parser.
    block = re.search(r"^dependencies = (\[.*?^\])", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block
    declared = {canonicalize_name(Requirement(line).name) for line in ast.literal_eval(block.group(1))}
    # FastAPI is made of Starlette's classes, and pydantic is nothing without its core.
    declared |= {canonicalize_name("starlette"), canonicalize_name("pydantic-core")}
    distributions = metadata.packages_distributions()
    missing = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"raytier"}:
                if declared.isdisjoint(canonicalize_name(name) for name in distributions.get(top, ())):
                    missing.add(f"{top} ({path.relative_to(ROOT)})")
    assert not missing, f"imported, not in pyproject.toml: {sorted(missing)}"


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_importing_does_not_load_torch(part: str) -> None:
    """D7: only processes that compute import torch."""
    code = (
        "import importlib, pkgutil, sys\n"
        f"part = importlib.import_module('raytier.{part}')\n"
        "for module in pkgutil.walk_packages(getattr(part, '__path__', []), part.__name__ + '.'):\n"
        "    if not module.name.endswith('__main__'):\n"
        "        importlib.import_module(module.name)\n"
        "    assert 'torch' not in sys.modules, f'{module.name} imports torch'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
