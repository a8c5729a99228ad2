"""Make the environments of the peers: `python benchmarks/peers/install.py [llama] [vllm] [hf]`.

Each is a virtual environment with pinned versions (`llama.txt`, `vllm.txt`, `hf.txt`), apart from raytier's own and
from each other: they ask for other versions of the same packages. One that is there already, with these pins, is left
as it is. Everything is named in the pins, so pip resolves nothing and pulls no CUDA packages; where the package index
has no CPU build of torch, name one that has: --pip-args "--extra-index-url https://download.pytorch.org/whl/cpu".
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: Where the benchmarks look; RAYTIER_PEERS names another place.
DEFAULT_DIR = HERE / "environments"
#: What is imported to see that an environment works.
IMPORTS = {"llama": "llama_cpp, gguf", "vllm": "vllm, vllm._C", "hf": "transformers, accelerate"}
_STAMP = "pins-installed"


def environments_dir() -> Path:
    return Path(os.environ.get("RAYTIER_PEERS", DEFAULT_DIR))


def python_of(name: str, directory: Path | None = None) -> Path | None:
    """The Python of a peer's environment; None when it is not installed with the present pins."""
    root = (directory or environments_dir()) / name
    stamp = root / _STAMP
    if stamp.is_file() and stamp.read_text() == _pins(name):
        return root / "bin" / "python"
    return None


def missing(*names: str) -> list[str]:
    """Those of the peers that are not installed, each with what to run."""
    return [f"{name} is not installed (python {__file__} {name})" for name in names if python_of(name) is None]


#: gcc believes that LDTILECFG reads 8 bytes and leaves out what writes the other 56: with AMX, llama.cpp then crashes
#: on quantised models (gcc 12.2, seen here). These passes are the ones that do it.
_KEEP_STORES = "-fno-tree-dse -fno-dse"
_BUILD = {
    "llama": {"CMAKE_ARGS": f"-DCMAKE_C_FLAGS='{_KEEP_STORES}' -DCMAKE_CXX_FLAGS='{_KEEP_STORES}'"},
}


def _pins(name: str) -> str:
    return hashlib.sha256((HERE / f"{name}.txt").read_bytes()).hexdigest()


def install(name: str, directory: Path, pip_args: list[str]) -> None:
    """Make one environment anew."""
    if name == "llama":
        for tool, package in (("cc", "gcc"), ("c++", "g++")):
            if shutil.which(tool) is None:
                raise SystemExit(
                    f"llama.cpp is built from source and there is no {tool}: install a compiler "
                    f"(Debian, Ubuntu: apt-get install {package})"
                )
    root = directory / name
    print(f"{name}: making {root}", flush=True)
    venv.create(root, clear=True, with_pip=True)
    python = str(root / "bin" / "python")
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", *pip_args]
    if name == "llama":
        command += ["--no-binary", "llama-cpp-python"]
        print(f"{name}: compiling llama.cpp takes some minutes", flush=True)
    subprocess.run([*command, "-r", str(HERE / f"{name}.txt")], check=True, env=os.environ | _BUILD.get(name, {}))
    subprocess.run([python, "-c", f"import {IMPORTS[name]}"], check=True, cwd=directory)
    (root / _STAMP).write_text(_pins(name))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the environments of the systems that raytier is compared with.")
    parser.add_argument("names", nargs="*", default=[], metavar="llama|vllm|hf", help="all of them")
    parser.add_argument("--dir", type=Path, default=environments_dir(), help="where (also: RAYTIER_PEERS)")
    parser.add_argument("--pip-args", default="", help="further arguments for pip")
    arguments = parser.parse_args()
    names = arguments.names or list(IMPORTS)
    if unknown := set(names) - IMPORTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(IMPORTS)}")
    arguments.dir.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        if python_of(name, arguments.dir) is not None:
            print(f"{name}: is there")
            continue
        try:
            install(name, arguments.dir, shlex.split(arguments.pip_args))
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: failed ({shlex.join(error.cmd[:6])} ... ended with {error.returncode})", file=sys.stderr)
    if failed:
        raise SystemExit(f"not installed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
