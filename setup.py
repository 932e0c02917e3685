"""Build script; all metadata is in pyproject.toml. Recipes, SLURM files and kernel sources ship inside the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("cifar", "imagenet", "digits", "slurm")


class BuildWithRecipes(build_py):
    """Copies the top-level folders that a user runs from into ``distributed_at/_recipes`` of the wheel."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # a checkout finds its own folders
        root = Path(__file__).resolve().parent
        target = Path(self.build_lib) / "distributed_at" / "_recipes"
        shutil.rmtree(target, ignore_errors=True)
        for name in SHIPPED:
            if (root / name).is_dir():
                shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        # compiled at first use, where a compiler is
        sources = Path(self.build_lib) / "distributed_at" / "ops" / "sources"
        sources.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.cu", "*.cpp", "*.h"):
            for source in (root / "kernels").glob(pattern):
                shutil.copy2(source, sources / source.name)


setup(cmdclass={"build_py": BuildWithRecipes})
