"""Puts configs/ and ablations/ into the wheel, as pmd/shipped/; everything else is said in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigurations(build_py):
    """Copies the packages, then the configurations; an editable install finds them in the repository."""

    def run(self) -> None:
        """Fill the folder from which the wheel is made."""
        super().run()
        if not self.editable_mode:
            for folder in ("configs", "ablations"):
                shutil.copytree(folder, Path(self.build_lib, "pmd", "shipped", folder), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigurations})
