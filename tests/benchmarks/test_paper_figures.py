"""The paper's two figures: their data are what runs wrote and what the benchmark measured. No times."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from helpers.paper import CONFIGS, QUIET, read, small_recipes
from helpers.small_runs import write_photographs
from jfbfast import DEGrad, DnCNN, GaussianBlur
from jfbfast.benchmarks import paper, rivals
from jfbfast.benchmarks.paper import figure1, figure2, published
from jfbfast.benchmarks.paper.plan import Plan
from jfbfast.benchmarks.paper.study import load_networks, measurement
from jfbfast.experiments.settings import make_settings, read_settings

pytestmark = pytest.mark.usefixtures("one_thread")


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
    curve = figure1.read("a", tmp_path / "run")
    points = curve.points
    assert curve.photographs == 4
    assert [p["phase"] for p in points] == ["pretraining"] * 4 + ["training"] * 6
    assert [p["step"] for p in points] == [1, 2, 2, 3, 1, 2, 2, 3, 4, 4]
    assert [p["total_step"] for p in points] == [1, 2, 2, 3, 4, 5, 5, 6, 7, 7]
    assert [p["epoch"] for p in points] == [2.0 * p["total_step"] for p in points]  # 8 of 4 photographs a step
    assert [p["seconds"] for p in points] == [2.5, 5, 6, 8, 10, 12, 13, 15, 17, 18]
    assert [p["loss"] for p in points] == [0.4, 0.2, None, 0.1, 0.08, 0.06, None, None, 0.04, None]
    assert [(p["total_step"], p["val_loss"]) for p in points if p["val_loss"]] == [(2, 0.5), (5, 0.09), (7, 0.05)]
    # Of the losses since the validation before, in the phase.
    means = [p["mean_loss"] for p in points if p["mean_loss"]]
    assert means == pytest.approx([0.3, 0.07, 0.04])

    (tmp_path / "run" / "config.yaml").unlink()
    unknown = figure1.read("b", tmp_path / "run")
    assert unknown.photographs is None and all(p["epoch"] is None for p in unknown.points)

    figure1.figure([curve, unknown]).savefig(tmp_path / "figure1.png")
    assert (tmp_path / "figure1.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"holds no metrics\.csv"):
        figure1.read("c", tmp_path)
    (tmp_path / "run" / "metrics.csv").write_text("phase,step,loss,val_psnr\ntraining,1,0.1,20\n")  # of another version
    with pytest.raises(ValueError, match="not the metrics of a run"):
        figure1.read("d", tmp_path / "run")


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
    paper.run(tmp_path, True, QUIET, plan, ("figure1",))  # its time is over
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
    values = figure1.settings("ours", replace(plan, resize=None, squash=True), 10, replace(setting, noise=0.02))
    assert (values["sigma"], values["noise"], values["squash"]) == (5.0, 0.02, False)


def test_figure1_trains_as_the_documented_settings_say():
    documented = Path(__file__).parents[2] / "docs" / "training"
    if not documented.exists():
        pytest.skip("outside the repository")
    plan = Plan(data=Path("faces"), steps=5000)
    for recipe, file in (("paper", "paper.yaml"), ("ours", "filtered.yaml")):
        mine = make_settings(figure1.settings(recipe, plan, 10_000, CONFIGS["ours"])).resolved()
        assert (mine.train, mine.validation, mine.crop, mine.log_every) == (1600, 400, 128, 1)
        values = {"data": "faces", **read_settings(documented / file)}
        theirs = make_settings({**values, "train": 1600, "validation": 400, "crop": 128}).resolved()
        same = replace(mine, interval=theirs.interval, log_every=theirs.log_every, logger=theirs.logger)
        assert same == theirs


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_figure2_measures_below_the_cap_and_marks_what_it_extrapolates(tmp_path, monkeypatch):
    plan = replace(Plan(), sizes=(16, 12), step_batch=1, evaluations=2, seconds=0.05, cap=1e9)
    times = figure2.measure(plan, QUIET, 4, 3)
    assert [(t["size"], t["side"]) for t in times] == [(size, side) for size in (12, 16) for side in figure2.LABELS]
    assert all(t["how"] in ("rounds", "once") and t["seconds"] > 0 and t["ratio"] > 0 for t in times)

    times = figure2.measure(replace(plan, cap=1e-9), QUIET, 4, 3)
    found = {(t["side"], t["size"]): t for t in times}
    for side in (figure2.CG, figure2.GMRES):
        measured, beyond = found[side, 12], found[side, 16]
        assert measured["how"] != "extrapolated" and beyond["how"] == "extrapolated" and beyond["q1"] is None
        assert beyond["seconds"] == pytest.approx(measured["seconds"] * (16 / 12) ** 2)
        assert beyond["ratio"] == pytest.approx(beyond["seconds"] / found[figure2.OURS, 16]["seconds"])
    assert found[figure2.PUBLISHED, 16]["how"] in ("rounds", "once") and found[figure2.OURS, 16]["how"] == "rounds"
    figure2.figure(times, "title").savefig(tmp_path / "figure2.png")
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    table = figure2._markdown(times)
    assert table.count("≈") == 2 and "| 12² | 16² |" in table


def test_only_the_jacobian_based_sides_take_the_exact_gradient(monkeypatch):
    from jfbfast.benchmarks import problem, step_sides
    from jfbfast.implicit.methods import Implicit

    monkeypatch.setattr(step_sides, "ours", lambda given, **options: options)
    given = problem.problem(problem.Weights(torch.nn.Identity(), 0.05, 3, 0.7, 0.01), 12, 1, torch.device("cpu"))
    made = step_sides.sides(given, exact=True)
    assert made[figure2.CG]() == {"gradient": Implicit("cg")} and made[figure2.GMRES]() == {
        "gradient": Implicit("gmres")
    }
    assert made[figure2.OURS]() == {}
