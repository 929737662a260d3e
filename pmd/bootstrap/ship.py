"""Writes a finished model and its tokenizer as a plain Hugging Face directory, all or nothing."""

import os
import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer, replacing an earlier model in `directory`."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        fresh, replaced = Path(temporary) / "fresh", Path(temporary) / "replaced"
        model.bfloat16().save_pretrained(fresh)
        tokenizer.save_pretrained(fresh, save_jinja_files=False)  # one file fewer to ship
        for path in fresh.iterdir():
            path.chmod(0o644)
        fresh.chmod(0o755)
        if directory.exists():
            shutil.move(directory, replaced)
        os.replace(fresh, directory)
