"""Do all sides compute the same? Greedy tokens of a tiny Llama, at batch 1 and 2, from every peer that is installed.

What makes this worth a check is the GGUF file, which `run_llama.py` writes itself: with the rows of q and k in the
wrong order llama.cpp runs as fast and says something else. Run it after a change of pins:
python benchmarks/peers/verify.py
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from random_model import Shape, write_model

from peers.install import missing, python_of
from peers.side import HERE, side

#: Heads of 64, the least that vLLM's attention on the CPU takes; bf16 ties are rare with so few tokens.
SHAPE = Shape(hidden=256, intermediate=512, layers=3, heads=4, kv_heads=2, vocab=500)
PROMPTS = [[5, 17, 99, 3, 250, 481], [7, 8, 9, 10, 11, 12]]
STEPS = 20


def main() -> None:
    for line in missing("hf", "llama", "vllm"):
        print(f"left out: {line}")
    with ExitStack() as stack:
        model = Path(stack.enter_context(TemporaryDirectory(prefix="raytier-verify-")))
        write_model(SHAPE, model)
        loads: dict[str, tuple[Path | str | None, dict[str, Any], dict[str, str]]] = {
            "raytier": (sys.executable, {"path": str(model), "settings": {"cache_dir": str(model)}}, {}),
            "hf": (python_of("hf"), {"path": str(model), "threads": 1}, {}),
        }
        if (python := python_of("llama")) is not None:
            gguf = str(model / "model.gguf")
            subprocess.run([str(python), str(HERE / "run_llama.py"), str(model), gguf], check=True)
            loads["llama"] = python, {"path": gguf, "context": 256, "sequences": 2, "threads": 1}, {}
        options = {"context": 128, "sequences": 2, "options": {"enforce_eager": True}}
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        loads["vllm"] = python_of("vllm"), {"path": str(model), **options}, environment
        seen: dict[str, list[list[int]]] = {}
        for name, (python, arguments, environ) in loads.items():
            if python is None:
                continue
            with side(name, python, f"run_{name}.py", model / f"{name}.log", environment=environ) as one:
                one.call("load", **arguments)
                runs = [one.decode(n, 6, 0, STEPS, ids=PROMPTS[:n]) for n in (1, 2)]
                seen[name] = [run.ids[:STEPS] for run in runs]  # a sequence that started before the others has more
                print(f"{name}: {seen[name][0]}", flush=True)
        different = [name for name, ids in seen.items() if ids != seen["raytier"]]
        if different:
            raise SystemExit(f"other tokens than raytier's: {', '.join(different)}")
        print(f"the same tokens from {', '.join(seen)}")


if __name__ == "__main__":
    main()
