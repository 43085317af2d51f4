"""A grid of students from one cache: what is trained, taken up again, summed up, refused."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from kdcache.cache.commit import read_commits
from kdcache.cache.reader import open_cache
from kdcache.cache.transcode import TranscodeOptions, transcode
from kdcache.cli import main
from kdcache.config import check_options
from kdcache.dump.launch import dump
from kdcache.errors import CacheMismatchError, ConfigError
from kdcache.evaluate.options import EvaluateOptions
from kdcache.evaluate.run import evaluate
from kdcache.sweep.grid import SweepOptions, plan_students, spelled
from kdcache.sweep.run import cost, measured_of, sweep
from kdcache.sweep.shown import plot, table
from kdcache.train.run import train
from tests.integration.test_dump import options

TRAIN = {"learning_rate": 3e-3, "max_steps": 3, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tiny_teacher, corpus_file):
    root = tmp_path_factory.mktemp("sweep")
    dump(options(tiny_teacher, corpus_file, root / "cache"))
    dump(options(tiny_teacher, corpus_file, root / "held", targets="hidden", split="train[:8]"))
    return root


def asked(caches, student, output, grid, **changes):
    train = TRAIN | {"cache": str(caches / "cache"), "student": student} | changes.pop("train", {})
    return SweepOptions(output=str(output), grid=grid, train=train, **changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory, caches, tiny_student):
    """Two temperatures, one of them twice as small a cache, two seeds."""
    output = tmp_path_factory.mktemp("swept") / "out"
    given = asked(
        caches, tiny_student, output, {"alpha": "0,1", "top_k": "8,4"}, seeds=2, teacher_cache=str(caches / "held")
    )
    return given, sweep(given)


def test_every_combination_and_seed_is_a_student_of_its_own(swept, caches):
    given, found = swept
    folders = sorted(path.name for path in (Path(given.output) / "students").iterdir())
    assert folders == sorted(
        f"alpha={alpha}_top_k={k}_seed={seed}" for alpha in (0, 1) for k in (8, 4) for seed in (0, 1)
    )
    assert not found["failed"] and len(found["points"]) == 4
    assert open_cache(Path(given.output) / "caches" / "top_k-4").spec.targets.k == 4
    assert not (Path(given.output) / "caches" / "top_k-8").exists(), "the cache itself has 8"
    for folder in folders:
        assert (Path(given.output) / "students" / folder / "model.safetensors").is_file()


def test_schemes_are_compared_over_caches_and_what_they_are_cut_down_to(
    caches, tiny_teacher, tiny_student, corpus_file, tmp_path
):
    """Axes of target schemes: other caches, and a mass of the same one; the teacher ran once for each that was dumped."""
    dump(options(tiny_teacher, corpus_file, tmp_path / "drawn", targets="systematic", num_draws=8, temperatures="1"))
    both = f"{caches / 'cache'},{tmp_path / 'drawn'}"
    given = asked(caches, tiny_student, tmp_path / "out", {"cache": both}, teacher_cache=str(caches / "held"))
    del given.train["cache"]
    found = sweep(given)
    assert not found["failed"] and found["cost"]["num_dumps"] == 2 and "ran 2 times" in table(found)
    names = sorted(p.name for p in (tmp_path / "out" / "students").iterdir())
    assert [name.split("-")[0] for name in names] == ["cache=cache", "cache=drawn"]
    seconds = sum(c.seconds for path in both.split(",") for c in read_commits(open_cache(path).store))
    live = 0.0
    for name, path in zip(names, both.split(","), strict=True):
        commits = read_commits(open_cache(path).store)
        results = json.loads((tmp_path / "out" / "students" / name / "train_results.json").read_text())
        live += results["train_tokens"] * sum(c.seconds for c in commits) / sum(c.stats.num_positions for c in commits)
    assert found["cost"]["live_teacher_seconds"] == pytest.approx(live, abs=0.06)
    assert found["cost"]["dump_seconds"] == pytest.approx(seconds, abs=0.06)
    cut = asked(caches, tiny_student, tmp_path / "cut", {"top_p": "1,0.5", "top_k": "8,4"})
    made = [student.options.cache for student in plan_students(cut)]
    assert [Path(next(iter(cache))).name for cache in made] == ["cache", "top_k-4", "top_p-0.5", "top_k-4_top_p-0.5"]
    assert open_cache(tmp_path / "cut" / "caches" / "top_k-4_top_p-0.5").spec.targets.scheme == "top_p"
    given.grid["top_k"] = [4]
    with pytest.raises(ConfigError, match="were drawn"):
        list(plan_students(given))


def test_losses_temperatures_and_learning_rates_are_compared(caches, tiny_student, tmp_path):
    """Every combination is trained as asked, one step each, and has its row."""
    grid = {"loss": "forward_kl,jsd", "temperature": "1,2", "learning_rate": "1e-3,1e-2"}
    train = {"max_steps": 1, "eval_cache": str(caches / "held")}
    given = asked(caches, tiny_student, tmp_path / "out", grid, metric="cross_entropy", train=train)
    del given.train["learning_rate"]
    found = sweep(given)
    wanted = sorted(product(["forward_kl", "jsd"], [1, 2], [0.001, 0.01]))
    assert not found["failed"] and sorted(tuple(one["point"].values()) for one in found["points"]) == wanted
    assert len({one["mean"]["cross_entropy"] for one in found["points"]}) == 8, "each is a student of its own"
    for student in plan_students(given):
        objective = json.loads((student.folder / "train_results.json").read_text())["objective"]
        assert (objective["loss"], objective["temperature"]) == (student.point["loss"], student.point["temperature"])
    rows = [tuple(line.split()[:3]) for line in table(found).splitlines()[2:10]]
    assert sorted(rows) == sorted(tuple(map(spelled, values)) for values in wanted)


def test_namesakes_are_told_apart_and_what_they_cost_is_that_of_their_dumps(caches, tiny_student, tmp_path):
    """Two caches of one name, cut down: two cut caches, in folders that a third one does not rename."""
    for folder in ("a", "b"):
        shutil.copytree(caches / "cache", tmp_path / folder / "cache")
    paths = [str(tmp_path / folder / "cache") for folder in ("a", "b")]
    given = asked(caches, tiny_student, tmp_path / "out", {"cache": paths, "top_k": "4,8"})
    del given.train["cache"]
    students = list(plan_students(given))
    assert len({student.folder for student in students}) == 4
    assert len({next(iter(student.options.cache)) for student in students}) == 4
    assert {student.caches for student in students} == {(path,) for path in paths}
    given.grid["cache"].append(str(caches / "cache"))
    more = list(plan_students(given))
    assert {student.folder for student in students} < {student.folder for student in more}


def test_the_cost_of_a_cache_made_of_another_is_not_known(caches, tiny_student, tmp_path):
    transcode(TranscodeOptions(cache=str(caches / "cache"), output=str(tmp_path / "small"), top_k=4))
    given = asked(caches, tiny_student, tmp_path / "out", {"alpha": "1"}, train={"cache": str(tmp_path / "small")},
                  teacher_cache=str(caches / "held"))  # fmt: skip
    found = sweep(given)
    assert "dump_seconds" not in found["cost"] and found["cost"]["num_students"] == 1
    assert "not known: a cache was made of another" in table(found)


def test_means_are_over_seeds_and_the_best_comes_first(swept):
    given, found = swept
    kls = [point["mean"]["forward_kl"] for point in found["points"]]
    assert kls == sorted(kls)
    best = found["points"][0]
    name = f"alpha={best['point']['alpha']}_top_k={best['point']['top_k']}"
    own = []
    for seed in (0, 1):
        report = json.loads((Path(given.output) / "students" / f"{name}_seed={seed}" / "evaluation.json").read_text())
        own.append(next(model["forward_kl"] for model in report["models"] if model["role"] == "student"))
    assert best["mean"]["forward_kl"] == pytest.approx(sum(own) / 2)
    assert best["deviation"]["forward_kl"] == pytest.approx(abs(own[0] - own[1]) / 2**0.5)
    assert json.loads((Path(given.output) / "sweep.json").read_text()) == found
    assert "±" in table(found) and "s at most: " in table(found)
    assert "at most" in table(found).split(": ")[-1] or "not yet earned back" in table(found)


def test_what_was_saved_is_measured(swept, caches):
    given, found = swept
    commits = read_commits(open_cache(caches / "cache").store)
    seconds, positions = sum(c.seconds for c in commits), sum(c.stats.num_positions for c in commits)
    tokens = [
        json.loads((path / "train_results.json").read_text())["train_tokens"]
        for path in (Path(given.output) / "students").iterdir()
    ]
    spent = found["cost"]
    assert spent["train_tokens"] == sum(tokens) and spent["num_students"] == 8
    assert spent["live_teacher_seconds"] == pytest.approx(sum(tokens) * seconds / positions, abs=0.1)
    assert spent["saved_seconds"] == pytest.approx(spent["live_teacher_seconds"] - seconds, abs=0.2)
    assert cost([]) == {}


def test_the_cost_is_that_of_all_stages(caches, tiny_student, tmp_path):
    then = [f"cache={caches / 'held'} alpha=0 max_steps=2"]
    given = asked(
        caches, tiny_student, tmp_path / "out", {"alpha": "1"}, teacher_cache=str(caches / "held"), train={"then": then}
    )
    spent = sweep(given)["cost"]
    folder = tmp_path / "out" / "students" / "alpha=1_seed=0"
    tokens = [
        json.loads((one / "train_results.json").read_text())["train_tokens"] for one in (folder / "stage-1", folder)
    ]
    dumped = [read_commits(open_cache(caches / name).store) for name in ("cache", "held")]
    seconds = [sum(c.seconds for c in commits) for commits in dumped]
    rates = [some / sum(c.stats.num_positions for c in commits) for some, commits in zip(seconds, dumped, strict=True)]
    assert spent["train_tokens"] == sum(tokens) and spent["num_dumps"] == 2
    assert spent["dump_seconds"] == pytest.approx(sum(seconds), abs=0.06)
    assert spent["live_teacher_seconds"] == pytest.approx(np.dot(tokens, rates), abs=0.06)


def test_again_trains_nothing_and_a_larger_grid_only_what_is_new(swept, caches, tiny_student):
    given, found = swept
    students = Path(given.output) / "students"
    before = {path: path.stat().st_mtime_ns for path in students.rglob("model.safetensors")}
    assert sweep(given) == found
    larger = given.model_copy(update={"grid": given.grid | {"alpha": [0, 1, 0.5]}, "seeds": 1})
    more = sweep(larger)
    assert len(more["points"]) == 6
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())


def test_the_plot_holds_its_data(swept):
    given, found = swept
    assert (Path(given.output) / "sweep.svg").is_file()
    tree = ET.fromstring(plot(found["points"], ["alpha", "top_k"], "forward_kl"))
    circles = [e for e in tree.iter("{http://www.w3.org/2000/svg}circle") if len(e)]
    assert len(circles) == 4
    said = {circle[0].text.split(" ±")[0] for circle in circles}
    assert said == {f"{point['mean']['forward_kl']:.4g}" for point in found["points"]}
    for circle in circles:
        assert 0 < float(circle.get("cx")) < 720 and 0 < float(circle.get("cy")) < 400
    lower = min(circles, key=lambda circle: float(circle.get("cy")))
    assert lower[0].text.startswith(f"{max(point['mean']['forward_kl'] for point in found['points']):.4g}")


def test_names_in_a_plot_cannot_break_it():
    point = {"point": {"loss": "<a&b>"}, "mean": {"kl": 1.0}, "deviation": {"kl": 0.0}, "seeds": 1}
    ET.fromstring(plot([point], ["loss"], "kl"))


def test_one_that_fails_is_said_and_does_not_end_the_others(caches, tiny_student, tmp_path):
    flags = [*(f"--train={name}={value}" for name, value in TRAIN.items()), f"--train=cache={caches / 'cache'}",
             f"--train=eval_cache={caches / 'cache'}", "--grid", f"student={tiny_student},/no/such", "--output", str(tmp_path / "s")]  # fmt: skip
    done = CliRunner().invoke(main, ["sweep", *flags])
    assert done.exit_code == 1
    assert "failed: student=-no-such_seed=0: " in done.output
    assert "forward_kl" in done.output and (tmp_path / "s" / "sweep.svg").is_file()


def test_whatever_a_run_fails_of_does_not_end_the_others(caches, tiny_student, tmp_path):
    """No error of kdcache's own: a file stands where a student's folder would."""
    given = asked(caches, tiny_student, tmp_path / "out", {"alpha": "0,1"}, teacher_cache=str(caches / "held"))
    (tmp_path / "out" / "students").mkdir(parents=True)
    (tmp_path / "out" / "students" / "alpha=0_seed=0").write_text("a file")
    found = sweep(given)
    assert list(found["failed"]) == ["alpha=0_seed=0"] and "Error: " in found["failed"]["alpha=0_seed=0"]
    assert [one["point"] for one in found["points"]] == [{"alpha": 1}]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == found


def test_what_a_crash_has_left_of_a_file_is_made_anew(caches, tiny_student, tmp_path):
    given = asked(caches, tiny_student, tmp_path / "out", {"alpha": "1"}, teacher_cache=str(caches / "held"))
    before = sweep(given)
    folder = tmp_path / "out" / "students" / "alpha=1_seed=0"
    for file in ("evaluation.json", "train_results.json"):
        (folder / file).write_bytes((folder / file).read_bytes()[:100])
        after = sweep(given)
        assert (
            not after["failed"]
            and after["points"][0]["mean"]["forward_kl"] == before["points"][0]["mean"]["forward_kl"]
        )
        assert json.loads((folder / file).read_text())
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_an_evaluation_of_another_run_or_of_other_text_is_not_taken_for_this_one(
    caches, tiny_student, tiny_teacher, corpus_file, tmp_path
):
    """A student that was trained again by hand, then a held-out cache that was made again at the same path."""
    shutil.copytree(caches / "held", tmp_path / "held")
    given = asked(caches, tiny_student, tmp_path / "out", {"alpha": "1"}, teacher_cache=str(tmp_path / "held"))
    folder = tmp_path / "out" / "students" / "alpha=1_seed=0"

    def told():
        found = sweep(given)
        assert not found["failed"]
        from_table = found["points"][0]["mean"]["forward_kl"]
        alone = EvaluateOptions(student=(str(folder),), teacher_cache=str(tmp_path / "held"))
        assert from_table == evaluate(alone)["models"][1]["forward_kl"]
        return from_table

    first = told()
    (student,) = plan_students(given)
    train(student.options.model_copy(update={"resume": False, "max_steps": 1}))
    replace = (folder / "train-student.yaml").read_text().replace("max_steps: 1", "max_steps: 3")
    (folder / "train-student.yaml").write_text(replace)  # as the sweep asks for it
    second = told()
    assert second != first
    shutil.rmtree(tmp_path / "held")
    dump(options(tiny_teacher, corpus_file, tmp_path / "held", targets="hidden", split="train[8:12]"))
    assert told() != second
    at = (folder / "evaluation.json").stat().st_mtime_ns
    sweep(given)
    assert (folder / "evaluation.json").stat().st_mtime_ns == at


@pytest.mark.parametrize("change", ["another", "made anew", "none before", "moved", "of an earlier kdcache"])
def test_what_training_evaluated_on_other_text_is_not_ranked_with_the_rest(
    caches, tiny_student, tiny_teacher, corpus_file, tmp_path, change
):
    """Without a teacher_cache: a student of the first sweep fails by name in a larger one; one that was held against the same text does not."""
    held = tmp_path / "held"
    shutil.copytree(caches / "held", held)
    first = {"teacher_cache": str(caches / "held")} if change == "none before" else {"train": {"eval_cache": str(held)}}
    assert not sweep(asked(caches, tiny_student, tmp_path / "out", {"alpha": "1"}, **first))["failed"]
    folder = tmp_path / "out" / "students" / "alpha=1_seed=0"
    if change == "another":
        held = caches / "cache"
    elif change == "made anew":
        shutil.rmtree(held)
        dump(options(tiny_teacher, corpus_file, held, targets="hidden", split="train[8:12]"))
    elif change == "moved":
        held = held.rename(tmp_path / "elsewhere")
    elif change == "of an earlier kdcache":
        told = json.loads((folder / "train-student.provenance.json").read_text())
        del told["contents"]["eval_cache"]
        (folder / "train-student.provenance.json").write_text(json.dumps(told))
    more = asked(caches, tiny_student, tmp_path / "out", {"alpha": "1,0.5"}, train={"eval_cache": str(held)})
    found = sweep(more)
    if change in ("moved", "of an earlier kdcache"):
        assert not found["failed"]
        return
    assert list(found["failed"]) == ["alpha=1_seed=0"] and [one["point"] for one in found["points"]] == [{"alpha": 0.5}]
    says = {
        "another": f"--eval-cache: was {tmp_path / 'held'}:1, this asks for {held}:1",
        "made anew": f"--eval-cache {held}: fingerprint was",
        "none before": f"--eval-cache: was none, this asks for {held}:1",
    }
    assert says[change] in found["failed"]["alpha=1_seed=0"] and f"remove {folder}" in found["failed"]["alpha=1_seed=0"]
    exact = more.model_copy(update={"teacher_cache": str(caches / "held")})
    assert len(sweep(exact)["points"]) == 2, "which evaluates all students"
    shutil.rmtree(folder)
    assert len(sweep(more)["points"]) == 2


@pytest.mark.parametrize("name", ["output", "seed", "resume"])
def test_what_the_sweep_sets_is_not_for_train_to_say(caches, tiny_student, tmp_path, name):
    """Refused where it was said of the sweep; passed over in the section of a config file, which is train-student's."""
    given = asked(caches, tiny_student, tmp_path / "s", {"alpha": "1"}, train={name: 0})
    with pytest.raises(ConfigError, match=f"--train {name}: set once for all, or by the sweep itself") as refused:
        list(plan_students(given))
    assert refused.value.hint
    config = tmp_path / "run.yaml"
    section = TRAIN | {
        "student": tiny_student,
        "cache": str(caches / "cache"),
        name: {"seed": 7, "resume": False}.get(name, "x"),
    }
    grid = {"grid": {"alpha": [1]}, "teacher_cache": str(caches / "held")}
    config.write_text(json.dumps({"train-student": section, "sweep": grid}))
    flags = ["sweep", "--config", str(config), "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(main, flags).exit_code == 0
    trained = tmp_path / "out" / "students" / "alpha=1_seed=0" / "model.safetensors"
    at = trained.stat().st_mtime_ns
    assert CliRunner().invoke(main, flags).exit_code == 0
    assert trained.stat().st_mtime_ns == at


def test_a_student_that_diverged_comes_last(caches, tiny_student, tmp_path):
    """Its weights are NaN: it is at no distance from the teacher that a comparison would see."""
    given = asked(caches, tiny_student, tmp_path / "out", {"alpha": "0,1"}, seeds=2, teacher_cache=str(caches / "held"))
    best, other = (point["point"]["alpha"] for point in sweep(given)["points"])
    folder = tmp_path / "out" / "students" / f"alpha={best}_seed=1"
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.save_pretrained(folder)
    (folder / "evaluation.json").unlink()
    found = sweep(given)
    assert not found["failed"]
    assert [one["point"]["alpha"] for one in found["points"]] == [other, best]
    assert math.isnan(found["points"][1]["mean"]["forward_kl"]) and math.isnan(found["points"][1]["mean"]["perplexity"])
    good, bad = table(found).splitlines()[2:4]
    assert "diverged" not in good and bad.count("diverged") == 6 and "nan" not in bad
    tree = ET.parse(tmp_path / "out" / "sweep.svg")
    assert len([e for e in tree.iter("{http://www.w3.org/2000/svg}circle") if len(e)]) == 1


def test_nothing_to_compare_by_is_refused_before_anything_is_trained(
    caches, tiny_student, tiny_teacher, corpus_file, tmp_path
):
    dump(options(tiny_teacher, corpus_file, tmp_path / "drawn", targets="sampled", num_draws=8, temperatures="1"))
    held = str(caches / "held")
    for changes, error, says in (
        ({}, ConfigError, "metric forward_kl: what is known of the students is nothing"),
        ({"teacher_cache": held, "metric": "foward_kl"}, ConfigError, "foward_kl: what is known .*perplexity"),
        ({"train": {"eval_cache": held}, "metric": "ECE"}, ConfigError, "ECE: .*calibration_error, cross_entropy"),
        ({"teacher_cache": str(tmp_path / "drawn")}, CacheMismatchError, "not to measure a divergence"),
    ):
        with pytest.raises(error, match=says):
            sweep(asked(caches, tiny_student, tmp_path / "s", {"alpha": "0,1"}, **changes))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("measure", ["teacher_cache", "eval_cache"])
def test_what_is_said_to_be_known_of_a_student_is(caches, tiny_student, tmp_path, measure):
    held = str(caches / "held")
    changes = {"teacher_cache": held} if measure == "teacher_cache" else {"train": {"eval_cache": held, "loss": "jsd"}}
    given = asked(caches, tiny_student, tmp_path / "s", {"alpha": "0.5"}, **changes)
    (point,) = sweep(given)["points"]
    (student,) = plan_students(given)
    assert measured_of(student, given.teacher_cache) <= point["mean"].keys()
    assert point["mean"].keys() - measured_of(student, given.teacher_cache) <= {"alpha", "temperature", "runtime"}


def test_numbers_of_a_grid_are_numbers(tmp_path):
    grid = {"learning_rate": "1e-3,5e-4,.5E+2", "loss": "jsd,tv", "alpha": ["1e-1", 0.5], "save-steps": 3}
    parsed = SweepOptions(output="o", grid=grid).grid
    assert parsed == {
        "learning_rate": [1e-3, 5e-4, 50.0],
        "loss": ["jsd", "tv"],
        "alpha": [0.1, 0.5],
        "save_steps": [3],
    }
    points = [{"point": {"lr": lr}, "mean": {"kl": 1.0}, "deviation": {"kl": 0.0}, "seeds": 1} for lr in SweepOptions(output="o", grid={"lr": "1e-3,5e-4,1e-2"}).grid["lr"]]  # fmt: skip
    svg = plot(points, ["lr"], "kl")
    assert re.findall(r'text-anchor="middle">(0\.[^<]+)<', svg) == ["0.0005", "0.001", "0.01"]


@pytest.mark.parametrize("again", ["alpha=0.9", "--train=seed=2"])
def test_what_is_given_twice_is_refused(tmp_path, again):
    flags = ["--grid", again] if again.startswith("a") else ["--train=seed=1", again]
    done = CliRunner().invoke(main, ["sweep", "--output", str(tmp_path / "s"), "--grid", "alpha=0.5", *flags])
    assert done.exit_code == 2 and "is given twice, as " in done.output
    with pytest.raises(ConfigError, match="learning_rate is given twice"):
        check_options(SweepOptions, "sweep", {"output": "o", "grid": {"learning_rate": "1", "learning-rate": "2"}})


def test_an_axis_that_the_config_sets_is_refused_with_its_place(caches, tiny_student, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"train-student: {{student: {tiny_student}, cache: {caches / 'cache'}, alpha: 0.5}}\nsweep: {{grid: {{alpha: [0, 1]}}}}\n"
    )
    done = CliRunner().invoke(main, ["sweep", "--config", str(config), "--output", str(tmp_path / "s")])
    assert done.exit_code == 1 and f"the section train-student of {config} sets it" in done.stderr
    assert "leave alpha out of that section" in done.stderr and "--train" not in done.stderr


@pytest.mark.parametrize("section", ["{}", "sweep: {}"])
def test_a_config_of_the_sweep_alone_is_enough(caches, tiny_student, tmp_path, section):
    train = TRAIN | {"student": tiny_student, "cache": str(caches / "cache")}
    own = {"grid": {"alpha": [0.5]}, "train": train, "teacher_cache": str(caches / "held")}
    (tmp_path / "run.yaml").write_text(section.format(json.dumps(own)))
    done = CliRunner().invoke(main, ["sweep", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "s")])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("grid", "changes", "says"),
    [
        ({"alpa": "1"}, {}, "there is no option 'alpa'"),
        ({"alpha": "2"}, {}, "alpha is between 0 and 1"),
        ({"temperature": "1,3"}, {}, "temperature 3 is not declared"),
        ({"loss": "rkl"}, {}, "expected one of"),
        ({"seed": "1,2"}, {}, "set once for all"),
        ({"learning_rate": "1,2"}, {}, "set once for all"),
        ({"top_k": "9"}, {}, "the cache keeps 8 entries"),
        ({"alpha": "0.5"}, {"train": {"student": None}}, "student"),
        ({"alpha": "0.5"}, {"train": {"then": ["temperature=3"]}}, "temperature 3 is not declared"),
        ({"alpha": "0.5"}, {"train": {"then": ["cache=[a,a]"]}}, "cache: a is named twice"),
        ({"alpha": "0.5"}, {"train": {"allow_incomplete": True}}, "allow_incomplete: (.|\n)*hint: .*kdcache status"),
        ({"allow_incomplete": "false,true"}, {}, "allow_incomplete: "),
        ({"alpha": "0.5"}, {"train": {"then": ["allow_incomplete=true"]}}, "allow_incomplete: "),
    ],
)
def test_bad_grids_are_refused_before_anything_is_trained(caches, tiny_student, tmp_path, grid, changes, says):
    with pytest.raises(ConfigError, match=says):
        list(plan_students(asked(caches, tiny_student, tmp_path / "s", grid, **changes)))
    assert not (tmp_path / "s" / "students").exists()


def test_an_unknown_metric_is_refused_with_those_that_are_known(caches, tiny_student, tmp_path):
    given = asked(
        caches,
        tiny_student,
        tmp_path / "s",
        {"alpha": "0.5"},
        metric="rouge",
        train={"eval_cache": str(caches / "cache")},
    )
    with pytest.raises(ConfigError, match="metric rouge: what is known of the students is .*forward_kl"):
        sweep(given)
