"""`python -m pmd export RUN --out DIR`: writes a run's student as a plain Hugging Face checkpoint or adapter."""

from contextlib import nullcontext
from pathlib import Path

from pmd.cli.arguments import make_parser
from pmd.config.load import LoadedConfig, load_config
from pmd.config.resume import check_model, find_changes
from pmd.config.save import saved_values
from pmd.errors import ConfigError
from pmd.run_dir import open_run
from pmd.run_lock import locked

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
    check_model(find_changes(state["pmd"]["config"], saved_values(loaded)))
    module = PMDModule(loaded.run)
    is_adapter = loaded.run.model.finetune != "full"
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"], strict=False)
    with module.policy.weights("student") as model:
        if is_adapter:
            model.save_pretrained(out, selected_adapters=["student"])
        else:
            model.save_pretrained(out)
    if is_adapter:  # PEFT writes a named adapter to a folder of that name
        for file in (out / "student").iterdir():
            file.rename(out / file.name)
        (out / "student").rmdir()
    module.tokenizer.save_pretrained(out)
