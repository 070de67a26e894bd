"""The paper's page and its command line."""

import sys
import warnings
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from helpers.paper import read, small_recipes
from jfbfast.benchmarks import __main__, paper
from jfbfast.benchmarks.paper import figure2
from jfbfast.benchmarks.paper.plan import QUICK
from jfbfast.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore")
def test_the_whole_run_writes_its_page(folder, checkpoints, tmp_path, monkeypatch):
    small_recipes(monkeypatch)
    monkeypatch.setattr(figure2, "untrained", lambda *_: problem_of(4, 3))
    options = ["--quick", "--train", 2, "--resize", 16, "--steps", 2, "--crop", 12, "--sizes", "12", "--evaluations", 1]
    options += ["--ours", checkpoints["ours"], "--denoiser", checkpoints["denoiser"], "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, ["bench", "paper", str(folder), *map(str, options)])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "paper.md").read_text(encoding="utf-8")
    for name in ("Figure 1", "Table 1", "Table 2", "Figure 2"):
        assert f"## {name}" in text
    assert "- deep unrolling: no --unrolled is given" in text and "| deep unrolling | missing |" in text
    for name in [word.split(")")[0] for word in text.split("](")[1:] if not word.startswith("http")]:
        assert (tmp_path / "out" / name).stat().st_size > 0, name
    (ours,) = (row for row in read(tmp_path / "out" / "table2.csv") if row["method"] == "ours")
    assert f"| ours by JFB | {float(ours['psnr']):.2f} ± " in text


def problem_of(features, depth):
    from jfbfast.benchmarks import problem

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return problem.untrained(features, depth)


def test_without_a_directory_it_takes_photographs_that_anyone_may_use(checkpoints, tmp_path):
    plan = replace(QUICK, checkpoints={"ours": checkpoints["ours"]}, validation=0.2, resize=24)
    console = Console(record=True, width=200)
    paper.run(tmp_path, True, console, plan, ("table1",))
    assert "taking three of scikit-image's" in console.export_text()
    assert {row["image"] for row in read(tmp_path / "table1.csv")} == {"1-astronaut.png", "2-chelsea.png"}
    with Image.open(tmp_path / "photographs" / "0-coffee.png") as image:
        assert image.size == (24, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: no image files"),
        (("figure3", "."), "'figure3' is no part; it takes figure1, table1"),
        (("table2", ".", "--ours", "nobody"), "nobody: there is no such file"),
        (("figure1", ".", "--run", "none"), "none holds no metrics.csv"),
        (("figure1", ".", "--published", "0"), "published is 0.0"),
        (("figure2", "--sizes", "a"), "--sizes is 'a'"),
        (("figure2", "--sizes", "4"), "sizes is (4,)"),
        (("table1", ".", "--pictures", "0"), "pictures is 0"),
        (("table2", ".", "--limit", "0"), "limit is 0"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, message):
    result = CliRunner().invoke(app, ["bench", "paper", *arguments])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert message in " ".join(result.output.split())


def test_both_command_lines_lead_to_it(monkeypatch, capsys):
    result = CliRunner().invoke(app, ["bench", "paper", "--help"])
    assert result.exit_code == 0 and "--feed-forward" in result.output
    monkeypatch.setattr(sys, "argv", ["benchmarks", "paper", "--help"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 0 and "--feed-forward" in capsys.readouterr().out
    assert "--checkpoint" in CliRunner().invoke(app, ["bench", "--help"]).output
