"""`python -m pmd export RUN --out DIR`: writes a run's student as a plain Hugging Face checkpoint or adapter."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pmd.cli.arguments import make_parser
from pmd.cli.model_card import model_card
from pmd.config.load import LoadedConfig, load_config
from pmd.config.resume import check_same_model, find_changes
from pmd.config.save import saved_values
from pmd.config.schema import ModelConfig
from pmd.errors import ConfigError, DiskError
from pmd.run_dir import RunDir, open_run
from pmd.run_lock import locked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pmd.module import PMDModule

DESCRIPTION = """Write the student of a run as a Hugging Face checkpoint, or as an adapter if the run trained one.

  python -m pmd export runs/tiny --out exported
  python -m pmd export runs/lora --out merged --merge          the adapter merged into the base
  python -m pmd export runs/lora --out adapter --push-to-hub me/my-adapter

`transformers` (with `peft` for an adapter) loads it without pmd. A model card, README.md, says how the model was made.
Memory is not exported: the student's prompts never contained any."""


def main(argv: list[str]) -> int:
    """Write the export; return 0."""
    parser = make_parser("export", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--ckpt", default="last", help="last, best or a checkpoint file (default: last)")
    parser.add_argument("--merge", action="store_true", help="merge an adapter into its base, loaded unquantised")
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="also upload it, to a private repository if it is new"
    )
    arguments = parser.parse_args(argv)
    run_dir, out = open_run(arguments.run), Path(arguments.out)
    loaded = load_config([run_dir.config])
    if loaded.problems:  # the run's data, engine and GPU are not needed here
        raise ConfigError(loaded.problems)
    checkpoint = run_dir.checkpoint(arguments.ckpt)
    is_adapter = loaded.run.model.finetune != "full"
    if arguments.merge and not is_adapter:
        raise ConfigError("--merge: the run trained all weights, so there is no adapter to merge; leave it out.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out} exists and is not empty; give a new folder.")

    inside = out.resolve().is_relative_to(run_dir.root.resolve())
    with locked(run_dir.root) if inside else nullcontext():
        _export(loaded, run_dir, checkpoint, out, merge=arguments.merge)
    print(f"exported {checkpoint} to {out}")
    if is_adapter and not arguments.merge:
        print(f"It is an adapter: load it with peft on {loaded.run.model.path} in {loaded.run.model.dtype}.")
    if arguments.push_to_hub:
        print(f"uploaded to {push_to_hub(out, arguments.push_to_hub)}")
    return 0


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload an export; return its address.

    Raises:
        ConfigError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of pmd")
    except Exception as error:  # network, HTTP and validation errors share no base class
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise ConfigError(
            f"--push-to-hub={repository}: not uploaded ({reason}); {folder} is complete. Log in with `hf auth login`, "
            "and upload it with `hf upload`."
        ) from error
    return str(address)


def _export(loaded: LoadedConfig, run_dir: RunDir, checkpoint: Path, out: Path, *, merge: bool) -> None:
    """Load the checkpoint and write its student, and a model card, to `out`."""
    module = load_module(loaded, checkpoint)
    is_adapter = loaded.run.model.finetune != "full"
    with complete_folder(out) as folder:
        save_student(module, folder, is_adapter=is_adapter)
        if merge:
            merge_adapter(folder, loaded.run.model)
        card = model_card(run_dir, loaded.run, checkpoint, is_adapter=is_adapter and not merge)
        (folder / "README.md").write_text(card, encoding="utf-8")


def load_module(loaded: LoadedConfig, checkpoint: Path) -> "PMDModule":
    """Return a run's student and teacher as a checkpoint holds them.

    Raises:
        CheckpointError: it is damaged or foreign.
        ConfigError: it is of another model.
    """
    from pmd.checkpoint_file import read_checkpoint
    from pmd.module import PMDModule

    state = read_checkpoint(checkpoint)
    check_same_model(find_changes(state["pmd"]["config"], saved_values(loaded)))
    module = PMDModule(loaded.run)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)
    return module


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


def merge_adapter(folder: Path, config: ModelConfig) -> None:
    """Replace an adapter in a folder by the model that it makes of its base, which is loaded unquantised."""
    from peft import PeftModel

    from pmd.pretrained import load_base

    base = load_base(dataclasses.replace(config, finetune="full"))
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        (folder / name).unlink(missing_ok=True)
    _save_model(merged, folder)


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
