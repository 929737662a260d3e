"""Writes `trainer_arguments.json`: the arguments of Lightning's Trainer and the plain types that they accept.

    python -m pmd.config.generate_trainer_arguments

Importing Lightning takes seconds, so the command line reads this file instead. Run this after upgrading Lightning; a
test compares the file with the installed version.
"""

import inspect
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pmd.config.trainer import ARGUMENTS_FILE, PLAIN_TYPES

#: Type: its name in the file.
NAMES = {hint: name for name, hint in PLAIN_TYPES.items()}


def trainer_arguments() -> dict[str, Any]:
    """Return Lightning's version and, by argument, the plain types that its annotation allows."""
    import lightning

    hints = typing.get_type_hints(lightning.Trainer.__init__)
    names = [name for name in inspect.signature(lightning.Trainer.__init__).parameters if name != "self"]
    arguments = {name: _plain_types(hints.get(name, Any)) for name in names}
    return {"lightning": lightning.__version__, "arguments": arguments}


def _plain_types(hint: Any) -> list[Any]:
    """Return the types in an annotation that YAML can write; classes, such as Lightning's own, are left out.

    In a fixed order: Python may return a union of the same types that it has made before, in another order.
    """
    if get_origin(hint) in (Union, types.UnionType):
        return sorted((name for option in get_args(hint) for name in _plain_types(option)), key=str)
    if get_origin(hint) is Literal:
        return [{"one of": list(get_args(hint))}]
    return [NAMES[hint]] if hint in NAMES else []


def main(path: Path = ARGUMENTS_FILE) -> None:
    """Write the file."""
    path.write_text(json.dumps(trainer_arguments(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
