"""The READMEs of the recipe folders say what the recipes say."""

import pytest

from distributed_at.recipe_readme import readme
from distributed_at.recipes import FOLDERS, list_recipes, recipe_root


@pytest.fixture(scope="module")
def entries():
    return list_recipes()


@pytest.mark.parametrize("folder", FOLDERS)
def test_generated_readme_is_current(folder, entries):
    text = (recipe_root() / folder / "README.md").read_text(encoding="utf-8")
    assert readme(folder, text=text, entries=entries) == text, "run python -m distributed_at.recipe_readme"


def test_readme_lists_every_row_with_the_papers_number():
    text = (recipe_root() / "imagenet" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if "table7.yaml#n30-clean0`" in line)
    assert "| 62.3 | 52.5 | 50.0 | 41.7 | 39.6 | 39.2 |" in row
