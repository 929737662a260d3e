"""The tiny worlds of synthetic puzzles, and the shipped models that run on a CPU."""

from pathlib import Path

SHIPPED_MODELS = {"tiny": "model", "tiny_hard": "hard", "tiny_exam": "exam"}


def shipped_model_path(name: str) -> Path:
    """Return the Hugging Face directory of a shipped model: `tiny`, `tiny_hard` or `tiny_exam`."""
    return Path(__file__).parent / SHIPPED_MODELS[name]
