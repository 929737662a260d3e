"""The shipped list of Lightning's Trainer arguments is that of the installed version."""

import json

from pmd.config.generate_trainer_arguments import main, trainer_arguments
from pmd.config.trainer import ARGUMENTS_FILE, CLASSES, OWN_ARGUMENTS, accepted_types

COMMAND = "python -m pmd.config.generate_trainer_arguments"


def test_the_list_is_that_of_the_installed_lightning(tmp_path):
    shipped, installed = json.loads(ARGUMENTS_FILE.read_text()), trainer_arguments()
    assert shipped["arguments"] == installed["arguments"], (
        f"trainer_arguments.json is from Lightning {shipped['lightning']}, and {installed['lightning']} is installed, "
        f"which differs; run {COMMAND}"
    )
    main(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == installed


def test_what_pmd_sets_itself_are_arguments():
    assert set(OWN_ARGUMENTS) <= accepted_types().keys()


def test_only_arguments_that_pmd_sets_itself_lack_a_plain_type():
    arguments = trainer_arguments()["arguments"]
    assert {name for name, options in arguments.items() if options in ([], ["null"])} <= {*OWN_ARGUMENTS, *CLASSES}
