"""What the tutorials say besides their programs, which the build of the site runs."""

import ast
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("plot_*.py"))


def text(path):
    """What the reader is told: the docstring, and the comments of the cells."""
    source = path.read_text(encoding="utf-8")
    comments = re.findall(r"(?m)^# ?(.*)$", source)
    return "\n".join([ast.get_docstring(ast.parse(source)) or "", *comments])


def test_there_are_six_tutorials_in_their_order():
    assert [path.name[:6] for path in TUTORIALS] == [f"plot_{number}" for number in range(1, 7)]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_says_how_to_run_it_and_where_to_go_on(path):
    told = text(path)
    assert "To run it yourself: ``pip install 'jfbfast[train]'``" in told
    assert "\nWhere to go on\n-----" in told
    assert "assert " in path.read_text(encoding="utf-8")  # what it claims in numbers, it checks


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_links_to_pages_of_the_site_that_exist(path):
    for page in re.findall(r"https://jfbfast\.github\.io/jfbfast/latest/(\w+)\.html", text(path)):
        assert (DOCS / f"{page}.md").exists(), page


def test_the_script_for_slurm_in_the_tutorial_is_the_one_that_ships():
    script = (DOCS / "training" / "several_machines.sh").read_text(encoding="utf-8").splitlines()
    needed = [line for line in script if line.strip() and (line.startswith("#SBATCH --") or not line.startswith("#"))]
    needed = [line for line in needed if not line.startswith("#SBATCH --job-name")]
    shown = text(DOCS / "tutorials" / "plot_6_machines.py")
    assert needed and not [line for line in needed if line.strip() not in shown]
