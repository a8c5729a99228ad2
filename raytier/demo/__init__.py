"""The small trained chat model that makes the first command work without a network."""

from pathlib import Path


def model_path() -> Path:
    """Directory of the embedded model: a plain Hugging Face checkpoint (Llama-shaped, safetensors)."""
    return Path(__file__).resolve().parent / "model"
