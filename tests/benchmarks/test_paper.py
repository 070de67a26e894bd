"""The paper's tables and figures: that their data are what the library measures, reads and chooses. No times."""

import csv
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from helpers.small_runs import write_photographs
from jfbfast import DEGrad, DnCNN, GaussianBlur
from jfbfast.benchmarks import __main__, paper, rivals
from jfbfast.benchmarks.paper import curves, figure1, figure2, published, table1
from jfbfast.benchmarks.paper.plan import QUICK, Plan
from jfbfast.benchmarks.paper.study import LABELS, Study, load_networks, measurement
from jfbfast.cli import app
from jfbfast.experiments.evaluation import evaluate, measurements
from jfbfast.experiments.settings import make_settings, read_settings, write_settings
from jfbfast.imaging.classical import gradient_descent
from jfbfast.imaging.quality import PAPER_OFFSET, psnr
from jfbfast.models.checkpoint import save_checkpoint
from jfbfast.models.config import ModelConfig

pytestmark = pytest.mark.usefixtures("one_thread")

DNCNN = {"kind": "DnCNN", "features": 4, "depth": 3, "norm": None, "spectral_norm": False, "residual": True}
CONFIGS = {
    "denoiser": ModelConfig("denoiser", DNCNN),
    "feed-forward": ModelConfig("feed-forward", DNCNN, padding_mode="zeros"),
    "unrolled": ModelConfig("preconditioned", DNCNN, padding_mode="zeros", gradient={"kind": "unrolled", "steps": 3}),
    "implicit": ModelConfig("filtered", DNCNN, padding_mode="zeros", gradient={"kind": "implicit"}),
    "paper": ModelConfig("paper", {**DNCNN, "residual": False}, padding_mode="zeros"),
    "ours": ModelConfig("filtered", DNCNN, padding_mode="zeros"),
}
QUIET = Console(quiet=True)


@pytest.fixture
def folder(tmp_path):
    """Six small smooth photographs: 2 are left out, 2 choose parameters, 2 are scored."""
    return write_photographs(tmp_path / "photographs", 6, (4, 4), (20, 20))


@pytest.fixture
def checkpoints(tmp_path):
    found = {}
    for role, config in CONFIGS.items():
        model = config.model()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(0.3)
        found[role] = str(tmp_path / f"{role}.safetensors")
        save_checkpoint(found[role], model, config)
    return found


@pytest.fixture
def plan(folder, checkpoints):
    return replace(QUICK, data=folder, checkpoints=checkpoints, train=2, validation=2, limit=None, resize=16)


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same(text, value):
    """Whether a CSV's cell holds the value."""
    return text == ("" if value is None else str(value)) or float(text) == pytest.approx(value, nan_ok=True)


def test_table2_holds_what_evaluate_measures(plan, tmp_path):
    paper.run(tmp_path, True, QUIET, plan, ("table2",))
    rows = read(tmp_path / "table2.csv")
    assert [row["method"] for row in rows] == list(LABELS)
    study = Study(plan, QUIET)
    assert [file.name for file in study.files] == ["4.png", "5.png"]
    for row in rows:
        name = row["method"]
        assert row["missing"] == "" and row["checkpoint"] == plan.checkpoints.get(
            "denoiser" if name == "pnp" else name, ""
        )
        found = evaluate(study.methods[name], study.images, study.validation, study.blur, 0.01, **study.options)
        for column, value in found.summary().items():
            assert column == "seconds" or same(row[column], value), (name, column)
        assert float(row["psnr"]) - float(row["psnr_paper"]) == pytest.approx(6.0206, abs=1e-3)
    assert {row["method"]: row["evaluations_max"] for row in rows}["unrolled"] == "3"
    assert (tmp_path / "table2.png").read_bytes().startswith(b"\x89PNG")


def test_tuning_takes_the_best_of_the_validation_images_alone(plan, tmp_path):
    paper.run(tmp_path, True, QUIET, plan, ("table2",))
    rows = read(tmp_path / "table2-tuning.csv")
    assert {row["method"] for row in rows} == {"gradient-descent", "tikhonov", "tv", "pnp"}
    told = {row["method"]: row["parameter"] for row in read(tmp_path / "table2.csv")}
    for name in {row["method"] for row in rows}:
        grid = [row for row in rows if row["method"] == name]
        quality = [float(row["validation_psnr"]) for row in grid]
        (chosen,) = (row for row in grid if row["chosen"] == "True")
        assert quality.index(max(quality)) == grid.index(chosen)
        assert (chosen["at_end"] == "True") == (chosen in (grid[0], grid[-1]))
        assert told[name] == f"{chosen['parameter']} = {float(chosen['value']):.3g}"
    study = Study(plan, QUIET)
    assert [file.name for file in study.validation_files] == ["2.png", "3.png"]
    assert study.validation.seed != study.images.seed  # or the first of both would share their noise
    ((x, d),) = measurements(study.validation, study.blur, 0.01, 16)
    for row in rows:
        if row["method"] == "gradient-descent" and int(row["value"]) < 100:
            descent = gradient_descent(study.blur, d, max_iter=int(row["value"]))
            assert float(row["validation_psnr"]) == pytest.approx(float(psnr(descent.value, x).mean()), abs=1e-4)


def test_what_is_missing_is_said(plan, tmp_path):
    console = Console(record=True, width=200)
    ours = {"ours": plan.checkpoints["ours"]}
    paper.run(tmp_path, True, console, replace(plan, checkpoints=ours, validation=0, train=4), ("table2",))
    rows = {row["method"]: row for row in read(tmp_path / "table2.csv")}
    assert "no --denoiser is given" in rows["pnp"]["missing"] and "no --paper" in rows["paper"]["missing"]
    assert "validation is empty" in rows["tikhonov"]["missing"]  # nothing chooses its parameter
    assert all(rows[name]["psnr"] == "" for name in ("pnp", "paper", "tikhonov"))
    assert float(rows["ours"]["psnr"]) > 0 and rows["ours"]["missing"] == ""
    text = console.export_text()
    assert "plug-and-play: missing" in text and "Tikhonov is not in the table: validation is empty" in text


def test_the_tables_leave_out_what_a_network_was_trained_on(plan, folder):
    values = {"data": str(folder), "train": 3, "validation": 1}
    write_settings(Path(plan.checkpoints["feed-forward"]).parent / "config.yaml", make_settings(values))
    console = Console(record=True, width=200)
    study = Study(replace(plan, train=None, validation=None), console)
    assert [[file.name for file in each] for each in (study.validation_files, study.files)] == [
        ["3.png"],
        ["4.png", "5.png"],
    ]
    assert "was trained on 3 of these photographs: they are left out." in console.export_text()
    Study(plan, console)
    assert "was trained on 1 of the photographs that choose or are scored." in console.export_text()


def test_a_checkpoint_of_another_kind_is_refused(plan):
    for role, wrong in (("ours", "implicit"), ("implicit", "ours"), ("denoiser", "paper"), ("paper", "ours")):
        given = {role: plan.checkpoints[wrong]}
        with pytest.raises(ValueError, match=rf"--{role} is .*{wrong}\.safetensors, of the form .*; it takes a"):
            Study(replace(plan, checkpoints=given), QUIET)


def test_table1_restores_the_measurements_of_table2(plan, tmp_path):
    paper.run(tmp_path, True, QUIET, plan, ("table1",))
    rows = read(tmp_path / "table1.csv")
    assert [(row["method"], row["image"]) for row in rows] == [
        (name, image) for name in table1.METHODS for image in ("4.png", "5.png")
    ]
    study = Study(plan, QUIET)
    for name in table1.METHODS:
        scores = evaluate(study.methods[name], study.images, study.validation, study.blur, 0.01, **study.options)
        mine = [row for row in rows if row["method"] == name]
        for column in ("psnr", "ssim"):
            found = [float(row[column]) for row in mine]
            assert found == pytest.approx(getattr(scores, column).tolist(), abs=1e-3), (name, column)
        assert float(mine[0]["psnr_paper"]) == pytest.approx(float(mine[0]["psnr"]) - PAPER_OFFSET)
        assert mine[0]["parameter"] == scores.summary()["parameter"]
    truth, restored = table1.restore(study, 1)
    assert len(truth) == 1 and torch.equal(truth[0], study.images[0].x)
    assert (tmp_path / "table1.png").read_bytes().startswith(b"\x89PNG")
    assert all(len(each.images) == 1 and each.images[0].isfinite().all() for each in restored)


def test_table1_leaves_out_what_cannot_restore(plan, tmp_path):
    console = Console(record=True, width=200)
    paper.run(tmp_path, True, console, replace(plan, validation=0), ("table1",))
    assert "gradient-descent" not in {row["method"] for row in read(tmp_path / "table1.csv")}
    assert "gradient descent, stopped early is not in the table: validation is empty" in console.export_text()


METRICS = """phase,step,seconds,loss,psnr,evaluations,val_loss,val_psnr,val_evaluations
pretraining,1,2.5,0.4,10,,,,
pretraining,2,5,0.2,13,,,,
pretraining,2,6,,,,0.5,9,
pretraining,3,8,0.1,16,,,,
training,1,10,0.08,17,5,,,
training,2,12,0.06,18,5,,,
training,2,13,,,,0.09,16.5,5
training,3,15,nan,nan,5,,,
training,4,17,0.04,20,5,,,
training,4,18,,,,0.05,19,5
"""


def metrics_of_a_run(directory):
    directory.mkdir()
    (directory / "metrics.csv").write_text(METRICS)
    return str(directory)


def test_figure1_reads_the_phases_of_a_run(folder, tmp_path):
    metrics_of_a_run(tmp_path / "run")
    settings = {"data": str(folder), "train": 4, "validation": 2, "batch_size": 8}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    curve = curves.read("a", tmp_path / "run")
    points = curve.points
    assert curve.photographs == 4
    assert [p.phase for p in points] == ["pretraining"] * 4 + ["training"] * 6
    assert [p.step for p in points] == [1, 2, 2, 3, 1, 2, 2, 3, 4, 4]
    assert [p.total_step for p in points] == [1, 2, 2, 3, 4, 5, 5, 6, 7, 7]
    assert [p.epoch for p in points] == [2.0 * p.total_step for p in points]  # 8 of 4 photographs a step
    assert [p.seconds for p in points] == [2.5, 5, 6, 8, 10, 12, 13, 15, 17, 18]
    assert [p.loss for p in points] == [0.4, 0.2, None, 0.1, 0.08, 0.06, None, None, 0.04, None]
    assert [(p.total_step, p.val_loss) for p in points if p.val_loss] == [(2, 0.5), (5, 0.09), (7, 0.05)]
    # Of the losses since the validation before, in the phase.
    means = [p.mean_loss for p in points if p.mean_loss]
    assert means == pytest.approx([0.3, 0.07, 0.04]) and not any(p.from_psnr for p in points)

    lines = [line.split(",") for line in METRICS.splitlines()]
    older = [",".join(line[:2] + line[3:6] + line[7:]) for line in lines]  # without seconds and val_loss
    (tmp_path / "run" / "metrics.csv").write_text("\n".join(older) + "\n")
    (tmp_path / "run" / "config.yaml").unlink()
    old = curves.read("b", tmp_path / "run")
    assert old.photographs is None and all(p.epoch is None and p.seconds is None for p in old.points)
    assert [p.val_loss for p in old.points if p.val_loss] == pytest.approx([4 * 10**-v for v in (0.9, 1.65, 1.9)])
    assert [p.from_psnr for p in old.points] == [p.val_psnr is not None for p in points]

    figure1.plot([curve, old], tmp_path / "figure1.png")
    assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"holds no metrics\.csv"):
        curves.read("c", tmp_path)
    (tmp_path / "run" / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not the metrics of a run"):
        curves.read("d", tmp_path / "run")


def small_recipes(monkeypatch):
    small = {"denoiser": "DnCNN", "features": 4, "depth": 3, "injection": False}
    recipes = {name: {**recipe, **small} for name, recipe in figure1.RECIPES.items()}
    monkeypatch.setattr(figure1, "RECIPES", recipes)


@pytest.mark.filterwarnings("ignore")
def test_figure1_trains_both_recipes_where_no_run_is_given(plan, tmp_path, monkeypatch):
    small_recipes(monkeypatch)
    plan = replace(plan, images=5, steps=4, crop=12, training_batch=2, training_max_iter=3)
    paper.run(tmp_path, True, QUIET, plan, ("figure1",))
    rows = read(tmp_path / "figure1.csv")
    assert list(dict.fromkeys(row["run"] for row in rows)) == list(figure1.NAMES.values())
    for recipe, name in figure1.NAMES.items():
        settings = read_settings(tmp_path / f"figure1-{recipe}" / "config.yaml")
        assert (settings["train"], settings["validation"], settings["form"]) == (
            4,
            1,
            {"paper": "paper", "ours": "filtered"}[recipe],
        )
        mine = [row for row in rows if row["run"] == name]
        metrics = read(tmp_path / f"figure1-{recipe}" / "metrics.csv")
        assert [(row["phase"], row["step"]) for row in mine] == [(row["phase"], row["step"]) for row in metrics]
        assert sum(row["loss"] != "" for row in mine) == int(mine[-1]["total_step"])  # every batch has its row
        assert [row["val_loss"] for row in mine if row["val_loss"]] == [
            str(float(row["val_loss"])) for row in metrics if row["val_loss"]
        ]
        pretraining = round(figure1.PRETRAINING[recipe] * 4)
        assert int(mine[-1]["total_step"]) == 4 + pretraining
        assert float(mine[-1]["epoch"]) == (4 + pretraining) / 2  # 2 of 4 photographs a step
        seconds = [float(row["seconds"]) for row in mine]
        assert seconds[0] > 0 and seconds == sorted(seconds)
    paper.run(tmp_path, True, QUIET, plan, ("figure1",))  # goes on with what is there, which is finished
    assert read(tmp_path / "figure1.csv") == rows
    other = write_photographs(tmp_path / "other", 6)
    (other / "0.png").unlink()
    with pytest.raises(ValueError, match=r"data is .*other; its photographs for training are not those"):
        paper.run(tmp_path, True, QUIET, replace(plan, data=other), ("figure1",))
    again = replace(plan, runs=tuple(f"{r}={tmp_path / f'figure1-{r}'}" for r in figure1.NAMES))
    paper.run(tmp_path / "again", True, QUIET, again, ("figure1",))
    assert [{**row, "run": ""} for row in read(tmp_path / "again" / "figure1.csv")] == [{**r, "run": ""} for r in rows]


@pytest.mark.filterwarnings("ignore")
def test_figure1_has_the_published_loop_for_some_time(plan, tmp_path, monkeypatch):
    small_recipes(monkeypatch)
    monkeypatch.setattr(published, "INTERVAL", 3)
    monkeypatch.setattr(published, "STEPS", 9)
    given = metrics_of_a_run(tmp_path / "given")
    plan = replace(plan, images=5, crop=12, training_batch=2, published=1e-4, sigma=2.0, runs=(given,))
    paper.run(tmp_path, True, QUIET, plan, ("figure1",))
    rows = read(tmp_path / "figure1.csv")
    assert list(dict.fromkeys(row["run"] for row in rows)) == ["given", figure1.PUBLISHED]
    mine = [row for row in rows if row["run"] == figure1.PUBLISHED]
    assert [(row["step"], row["loss"] != "", row["val_psnr"] != "") for row in mine] == [
        ("1", True, False),
        ("2", True, False),
        ("3", True, False),
        ("3", False, True),
    ]
    assert mine[0]["epoch"] == "0.5"  # 2 of 4 photographs
    kept = read_settings(tmp_path / "figure1-published" / "config.yaml")
    assert (kept["sigma"], kept["step_size"], kept["learning_rate"], kept["validation"]) == (2.0, 1e-3, 1e-4, 1)
    paper.run(tmp_path, True, QUIET, plan, ("figure1",))  # whose time is over
    assert read(tmp_path / "figure1.csv") == rows
    paper.run(tmp_path, True, QUIET, replace(plan, published=60.0), ("figure1",))
    longer = [row for row in read(tmp_path / "figure1.csv") if row["run"] == figure1.PUBLISHED]
    assert longer[:4] == mine and longer[-1]["step"] == "9" and len(longer) == 12
    with pytest.raises(ValueError, match=r"sigma is 4\.0; the run in .* was started with 2\.0"):
        paper.run(tmp_path, True, QUIET, replace(plan, sigma=4.0), ("figure1",))
    with pytest.raises(ValueError, match="padding_mode is reflect; the published loop takes zeros"):
        paper.run(tmp_path / "other", True, QUIET, replace(plan, padding_mode="reflect"), ("figure1",))


def test_the_published_layer_is_the_papers(monkeypatch):
    monkeypatch.setattr(rivals, "gilton_anderson", lambda layer, x0, *_: x0)
    ours = DEGrad(GaussianBlur(5, 1.0), DnCNN(features=4, depth=3), step_size=0.3)
    theirs = published.PublishedDEGrad(ours, 1e-3, 20).eval()
    d = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(theirs(d), ours.eval().layer(ours.blur.adjoint(d), d))
    theirs(d).square().mean().backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())


def test_figure1_has_the_measurements_of_ours(plan, folder):
    shipped = replace(plan, checkpoints={"ours": "gaussian5-sigma5"})
    networks = load_networks(shipped)
    setting = measurement(shipped, networks)
    assert (setting.sigma, setting.noise, setting.padding_mode) == (5.0, 0.01, "zeros")
    assert measurement(replace(shipped, sigma=2.0), networks).sigma == 2.0
    values = figure1.settings("ours", replace(plan, sigma=5.0, noise=0.02, resize=None, squash=True), 10)
    assert (values["sigma"], values["noise"], values["squash"]) == (5.0, 0.02, False)


def test_figure1_trains_as_the_documented_settings_say():
    documented = Path(__file__).parents[2] / "docs" / "training"
    if not documented.exists():
        pytest.skip("outside the repository")
    plan = Plan(data=Path("faces"), steps=5000)
    for recipe, file in (("paper", "paper.yaml"), ("ours", "filtered.yaml")):
        mine = make_settings(figure1.settings(recipe, plan, 10_000)).resolved()
        assert (mine.train, mine.validation, mine.crop, mine.log_every) == (1600, 400, 128, 1)
        values = {"data": "faces", **read_settings(documented / file)}
        theirs = make_settings({**values, "train": 1600, "validation": 400, "crop": 128}).resolved()
        same = replace(mine, interval=theirs.interval, log_every=theirs.log_every, tensorboard=theirs.tensorboard)
        assert same == theirs


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_figure2_measures_below_the_cap_and_marks_what_it_extrapolates(tmp_path, monkeypatch):
    plan = replace(Plan(), sizes=(16, 12), step_batch=1, evaluations=2, seconds=0.05, cap=1e9)
    times = figure2.measure(plan, QUIET, 4, 3)
    assert [(t.size, t.side) for t in times] == [(size, side) for size in (12, 16) for side in figure2.LABELS]
    assert all(t.how in ("rounds", "once") and t.seconds > 0 and t.ratio > 0 for t in times)

    times = figure2.measure(replace(plan, cap=1e-9), QUIET, 4, 3)
    found = {(t.side, t.size): t for t in times}
    for side in (figure2.CG, figure2.GMRES):
        measured, beyond = found[side, 12], found[side, 16]
        assert measured.how != "extrapolated" and beyond.how == "extrapolated" and beyond.q1 is None
        assert beyond.seconds == pytest.approx(measured.seconds * (16 / 12) ** 2)
        assert beyond.ratio == pytest.approx(beyond.seconds / found[figure2.OURS, 16].seconds)
    assert found[figure2.PUBLISHED, 16].how in ("rounds", "once") and found[figure2.OURS, 16].how == "rounds"
    figure2.plot(times, "title", tmp_path / "figure2.png")
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    table = figure2._markdown(times)
    assert table.count("≈") == 2 and "| 12² | 16² |" in table


def test_the_jacobian_based_side_solves_the_normal_equations_and_the_others_do_not(monkeypatch):
    from jfbfast.benchmarks import implicit_rivals, problem
    from jfbfast.implicit.methods import Implicit

    seen = {}
    monkeypatch.setattr(implicit_rivals, "ours", lambda given, layer, half, **options: seen.update(options) or options)
    given = problem.problem(problem.Weights(torch.nn.Identity(), 0.05, 3, 0.7, 0.01), 12, 1, torch.device("cpu"))
    made = {name: make() for name, make in implicit_rivals.jacobian_sides(given, "paper")}
    assert made[figure2.CG]["gradient"] == Implicit("cg") and made[figure2.GMRES]["gradient"] == Implicit("gmres")


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
        (("table2", ".", "--ours", "nobody"), "nobody: not a whole checkpoint"),
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
