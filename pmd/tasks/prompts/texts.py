"""The texts of the chat prompts: those in `templates/`, or a user's own versions of them in `prompts.folder`.

Fields are written in braces, as `{question}`. An edited text holds the same fields as the original, so that nothing is
left out that the run relies on, and nothing unknown is asked for.
"""

import re
from pathlib import Path

ORIGINALS = Path(__file__).parent / "templates"
FIELD = re.compile(r"\{(\w+)\}")


def read_texts(folder: str | None) -> dict[str, str]:
    """Return every text by name; those that the folder lacks are the originals."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ORIGINALS.glob("*.txt"))}
    if folder is not None:
        texts |= {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.txt"))}
    return texts


def describe_text_problems(folder: str | None) -> list[str]:
    """Return what is wrong with the texts of a folder, by file."""
    if folder is None:
        return []
    key, originals = f"prompts.folder={folder}", read_texts(None)
    if not Path(folder).is_dir():
        return [f"{key} is not a folder; make it with `python -m pmd prompts export {folder}`."]
    problems = []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix != ".txt" or path.stem not in originals:
            problems.append(f"{key}: {path.name} is no prompt; use {', '.join(f'{name}.txt' for name in originals)}.")
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            problems.append(f"{key}: {path.name} cannot be read ({error}); write it as UTF-8 text.")
            continue
        wanted, found = set(FIELD.findall(originals[path.stem])), set(FIELD.findall(text))
        if wanted != found:
            fields = ", ".join(f"{{{name}}}" for name in sorted(wanted)) or "no fields"
            odd = ", ".join(f"{{{name}}}" for name in sorted(wanted ^ found))
            problems.append(f"{key}: {path.name} must hold {fields}, each at least once; look at {odd}.")
    return problems


def export_texts(folder: Path) -> list[Path]:
    """Write the originals to a folder and return their paths; files that are there already are left as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in read_texts(None).items():
        path = folder / f"{name}.txt"
        if not path.exists():
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written
