"""Copies `recipes/` into the wheel, as `sae_accel/recipes/`. Everything else about the package is in `setup.cfg`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        # An editable install reads the folder of the checkout.
        if not self.editable_mode:
            target = Path(self.build_lib) / "sae_accel" / "recipes"
            # The build folder may hold recipes of an earlier build that are gone by now.
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("recipes", target)


setup(cmdclass={"build_py": BuildWithRecipes})
