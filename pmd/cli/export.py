"""`python -m pmd export RUN --out DIR`: writes a run's student as a plain Hugging Face checkpoint or adapter."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pmd.cli.arguments import make_parser
from pmd.config.load import LoadedConfig, load_config
from pmd.config.resume import check_same_model, find_changes
from pmd.config.save import saved_values
from pmd.errors import ConfigError, DiskError
from pmd.run_dir import open_run
from pmd.run_lock import locked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pmd.module import PMDModule

DESCRIPTION = """Write the student of a run as a Hugging Face checkpoint, or as an adapter if the run trained one.

  python -m pmd export runs/tiny --out exported

`transformers` (with `peft` for an adapter) loads it without pmd. Memory is not exported: the student's prompts never
contained any."""


def main(argv: list[str]) -> int:
    """Write the export; return 0."""
    parser = make_parser("export", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--ckpt", default="last", help="last, best or a checkpoint file (default: last)")
    arguments = parser.parse_args(argv)
    run_dir, out = open_run(arguments.run), Path(arguments.out)
    loaded = load_config([run_dir.config])
    if loaded.problems:  # the run's data, engine and GPU are not needed here
        raise ConfigError(loaded.problems)
    checkpoint = run_dir.checkpoint(arguments.ckpt)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out} exists and is not empty; give a new folder.")

    inside = out.resolve().is_relative_to(run_dir.root.resolve())
    with locked(run_dir.root) if inside else nullcontext():
        _export(loaded, checkpoint, out)
    print(f"exported {checkpoint} to {out}")
    if loaded.run.model.finetune != "full":
        print(f"It is an adapter: load it with peft on {loaded.run.model.path} in {loaded.run.model.dtype}.")
    return 0


def _export(loaded: LoadedConfig, checkpoint: Path, out: Path) -> None:
    """Load the checkpoint and write its student to `out`."""
    from pmd.checkpoint_file import read_checkpoint
    from pmd.module import PMDModule

    state = read_checkpoint(checkpoint)
    check_same_model(find_changes(state["pmd"]["config"], saved_values(loaded)))
    module = PMDModule(loaded.run)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)
    with complete_folder(out) as folder:
        save_student(module, folder, is_adapter=loaded.run.model.finetune != "full")


@contextmanager
def complete_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` to fill; it becomes `out` when it is complete, and is removed if it does not.

    Raises:
        DiskError: it cannot be written.
    """
    final = out.absolute()
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed export
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, final)  # also replaces an empty folder
    except (OSError, SafetensorError) as error:
        raise DiskError(f"--out={out} cannot be written ({error}); nothing was exported.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_student(module: "PMDModule", folder: Path, is_adapter: bool) -> None:
    """Write weights, configuration and tokenizer."""
    with module.policy.weights("student") as model:
        if is_adapter:
            model.save_pretrained(folder, selected_adapters=["student"])
        else:
            _save_model(model, folder)
    if is_adapter:  # PEFT writes a named adapter to a folder of that name
        for file in (folder / "student").iterdir():
            file.rename(folder / file.name)
        (folder / "student").rmdir()
    module.tokenizer.save_pretrained(folder)


def _save_model(model: "PreTrainedModel", folder: Path) -> None:
    """Save a model with its generation settings as they are, also those that transformers loads but refuses to save."""
    settings = model.generation_config
    if settings is not None:
        model.generation_config = type(settings)()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = settings
    if settings is not None:
        settings.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])
