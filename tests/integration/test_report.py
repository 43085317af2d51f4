"""kdcache evaluate --report: numbers against a plain computation, the page in a browser, and what is refused."""

import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache.cache.reader import open_cache
from kdcache.cli.evaluate import table
from kdcache.evaluate.report import render
from tests.integration.test_cli import cli

HOSTILE = "</p><script>document.title='owned'</script><img src=x onerror=alert(1)> & \"the cat\""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr")  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_teacher, tiny_student, corpus_file):
    """Caches, a student and a baseline."""
    root = tmp_path_factory.mktemp("report <b>")
    common = ["dump-teacher", "--teacher", tiny_teacher, "--dataset", corpus_file, "--seq-len", 64]
    cli(*common, "--output", root / "held", "--split", "train[60%:]", "--targets", "hidden")
    cli(*common, "--output", root / "held-top", "--split", "train[60%:]", "--top-k", 16)
    cli(*common, "--output", root / "cache", "--split", "train[:60%]", "--targets", "sampled")
    training = ["train-student", "--cache", root / "cache", "--student", tiny_student, "--max-steps", 6, "--learning-rate", 0.01,
                "--config", root / "run.yaml"]  # fmt: skip
    (root / "run.yaml").write_text("train-student: {logging_steps: 2, per_device_train_batch_size: 4}\n")
    cli(*training, "--output", root / "kd", "--eval-cache", root / "held")
    shutil.copytree(tiny_student, root / "kd-1")  # stands for another seed
    cli(*training, "--output", root / "ce", "--alpha", 0)
    rows = [
        {"prompt": HOSTILE, "completion": "sat on <a mat>"},
        {"prompt": "rain fell from", "completion": "heavy clouds"},
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def found(root, tiny_teacher):
    out = cli(
        "evaluate", "--student", root / "kd", "--student", root / "kd-1", "--baseline", root / "ce", "--full", tiny_teacher, "--teacher-cache", root / "held", "--report", root / "report.html", "--prompts", root / "prompts.jsonl", "--teacher", tiny_teacher, "--max-new-tokens", 8,
        "--num-resamples", 200, "--json",
    )  # fmt: skip
    return json.loads(out.stdout)


def test_the_page_is_made_of_the_json_alone(root, found):
    assert render(found) == (root / "report.html").read_text()


def test_bins_sum_to_the_whole(found):
    for model in found["models"]:
        for key in ("kl_by_context", "kl_by_entropy"):
            assert sum(b["positions"] for b in model[key]) == model["num_targets"]
            whole = sum(b["positions"] * b["forward_kl"] for b in model[key]) / model["num_targets"]
            assert whole == pytest.approx(model["forward_kl"], rel=1e-12)
        assert sum(b["positions"] for b in model["calibration"]) == model["num_targets"]
        ece = sum(b["positions"] * abs(b["confidence"] - b["accuracy"]) for b in model["calibration"])
        assert ece / model["num_targets"] == pytest.approx(model["calibration_error"])


def test_against_a_plain_computation(root, found, tiny_teacher):
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (tiny_teacher, root / "kd")
    )
    kl, read, entropy = [], [], []
    for row in open_cache(root / "held"):
        ids, positions = (
            torch.from_numpy(x.astype(np.int64))[None] for x in (row.sequence.input_ids, row.sequence.position_ids)
        )
        with torch.no_grad():
            t, s = (
                m(input_ids=ids, position_ids=positions, use_cache=False).logits[0].double().log_softmax(1)
                for m in (teacher, student)
            )
        mask = row.sequence.target_mask
        kl.append((t.exp() * (t - s)).sum(1).numpy()[mask])
        entropy.append(-(t.exp() * t).sum(1).numpy()[mask])
        read.append(row.sequence.position_ids[mask].astype(int) + 1)
    kl, read, entropy = map(np.concatenate, (kl, read, entropy))
    model = found["models"][1]
    assert model["forward_kl"] == pytest.approx(kl.mean(), rel=1e-4)
    for b in model["kl_by_context"]:
        inside = (read >= b["from"]) & (read <= b["to"])
        assert (inside.sum(), kl[inside].mean()) == (b["positions"], pytest.approx(b["forward_kl"], rel=1e-3))
    for b in model["kl_by_entropy"]:
        inside = (entropy >= b["from"]) & (entropy < (b["to"] or 1e9))
        assert inside.sum() == pytest.approx(b["positions"], abs=2)


def test_seeds_differences_and_shares(root, found):
    summary, models = found["summary"], found["models"]
    assert [m["role"] for m in models] == ["teacher", "student", "student", "baseline", "full"]
    mean = (models[1]["forward_kl"] + models[2]["forward_kl"]) / 2
    assert summary["spread"]["student"]["mean"]["forward_kl"] == pytest.approx(mean)
    told = summary["differences"]["forward_kl"]
    assert told["value"] == pytest.approx(mean - models[3]["forward_kl"])
    assert told["low"] <= told["value"] <= told["high"]
    far, near = models[4]["forward_kl"], models[3]["forward_kl"]
    assert summary["gap"]["far_end"] == "full"
    assert summary["gap"]["forward_kl"]["value"] == pytest.approx((mean - near) / (far - near))
    text = table(found)
    assert "student, mean of 2" in text and "student, deviation of 2" in text
    assert "share of the cross-entropy gap from baseline to full" in text


def test_answers_tokens_and_curves(found):
    said = found["generations"]
    assert set(said["prompts"][0]["answers"]) == {"teacher", "student", "baseline", "full"}
    assert said["prompts"][0]["rouge_l"]["teacher"].keys() == {"reference"}
    assert said["prompts"][0]["rouge_l"]["student"].keys() == {"reference", "teacher"}
    tokens = found["strip"]["tokens"]
    assert found["strip"]["role"] == "student"
    assert all(t["forward_kl"] >= -1e-5 and len(t["teacher"]) == len(t["student"]) == 3 for t in tokens)
    student = found["models"][1]
    assert [step for step, _ in student["curves"]["loss"]] == [2, 4, 6]
    assert len(student["curves"]["eval_cross_entropy"]) == 1


def test_entries_and_tail_are_said_to_be_a_bound(root, found, tmp_path):
    arguments = [
        "evaluate",
        "--student",
        root / "kd",
        "--teacher-cache",
        root / "held-top",
        "--report",
        tmp_path / "r.html",
    ]
    some = json.loads(cli(*arguments, "--json").stdout)
    text = table(some)
    assert "KL is a lower bound" in text and "--targets hidden" in text and "KL(teacher‖·) ≥" in text
    assert "full vocabulary" not in text and "KL in nats a token, over kept entries and one tail" in text
    assert "full vocabulary" in table(found)
    assert "KL is a lower bound" in (tmp_path / "r.html").read_text()
    teacher, student = some["models"]
    exact_teacher, exact = found["models"][:2]
    assert 0 < student["forward_kl"] < exact["forward_kl"]
    assert teacher["cross_entropy"] == pytest.approx(exact_teacher["cross_entropy"], abs=2e-2)
    for name in ("cross_entropy", "accuracy", "top1_agreement", "calibration_error"):
        assert student[name] == pytest.approx(exact[name], abs=2e-3), name


# --- students that are not as they should be -----------------------------------------------------------------------------


def evaluation(root, *more):
    """Arguments that hold the distilled student against the exact cache."""
    return ["evaluate", "--student", root / "kd", "--teacher-cache", root / "held", *more]


def spoiled(folder, source, which):
    """A copy of a student, some weights of which are NaN."""
    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[which] = torch.nan
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("cache", "everywhere"), [("held", True), ("held-top", False)])
def test_a_student_that_gives_nan_has_diverged(root, tmp_path, cache, everywhere):
    """One that is NaN all over, or after one token that occurs: no number is told of it, and nothing else is lost."""
    ids = np.concatenate([row.sequence.input_ids for row in open_cache(root / "held")])
    nan = spoiled(tmp_path / "nan", root / "kd", slice(None) if everywhere else int(np.bincount(ids).argmax()))
    arguments = ["evaluate", "--teacher-cache", root / cache, "--baseline", root / "ce", "--num-resamples", 100]
    report = tmp_path / "r.html"
    alone = json.loads(cli(*arguments, "--student", nan, "--report", report, "--json").stdout)
    teacher, student, baseline = alone["models"]
    for name in ("perplexity", "cross_entropy", "forward_kl", "reverse_kl", "top1_agreement", "accuracy", "acceptance_rate",
                 "calibration_error", "overconfidence"):  # fmt: skip
        assert np.isnan(student[name]) and np.isfinite([teacher[name], baseline[name]]).all(), name
    assert all(alone["summary"]["gap"][name]["value"] is None for name in ("cross_entropy", "forward_kl", "accuracy"))
    lines = table(alone).splitlines()
    assert [line.count("diverged") for line in lines[2:5]] == [0, 6, 0]
    assert "nan" not in table(alone) and "share of the cross-entropy gap" not in table(alone)
    text = report.read_text()
    assert "The student diverged" in text and "100.0%" in text and not re.search(r"[>^ ]nan[%<]", text)
    assert render(alone) == text
    read = html.unescape(text)
    assert alone["strip"]["role"] == "baseline" and "baseline's first choice" in read
    assert not re.search(r"student's (first choice|distribution over it)|teacher‖student|student gave it", read)
    seeds = json.loads(cli(*arguments, "--student", root / "kd", "--student", nan, "--report", report, "--json").stdout)
    assert np.isnan(seeds["summary"]["spread"]["student"]["mean"]["forward_kl"])
    assert "student, mean of 2  diverged" in re.sub(" {2,}", "  ", table(seeds))
    assert "The student 2 diverged" in report.read_text() and seeds["strip"]["tokens"]
    assert seeds["strip"]["role"] == "student" and "student's first choice" in html.unescape(report.read_text())


def test_what_another_program_left_in_a_folder_is_no_record(root, tmp_path):
    """As run_clm.py of transformers leaves it: ``save_metrics("train")`` and ``save_state()``."""
    shutil.copytree(root / "ce", tmp_path / "other")
    for file in ("train_results.json", "metrics.jsonl"):
        (tmp_path / "other" / file).unlink()
    train = {"epoch": 3.0, "total_flos": 1.6e15, "train_loss": 3.1, "train_runtime": 81.2, "train_samples": 240,
             "train_samples_per_second": 8.9, "train_steps_per_second": 1.1}  # fmt: skip
    state = {"best_metric": None, "epoch": 3.0, "global_step": 90, "log_history": [
        {"epoch": 0.33, "grad_norm": 1.2, "learning_rate": 4.5e-05, "loss": 3.9, "step": 10}, train | {"step": 90}]}  # fmt: skip
    evaluated = {"epoch": 3.0, "eval_loss": 3.2, "perplexity": 24.5}
    for name, content in (("train", train), ("all", train | evaluated), ("eval", evaluated)):
        (tmp_path / "other" / f"{name}_results.json").write_text(json.dumps(content, indent=4, sort_keys=True))
    (tmp_path / "other" / "trainer_state.json").write_text(json.dumps(state))
    arguments = evaluation(root, "--baseline", tmp_path / "other")
    found = json.loads(cli(*arguments, "--report", tmp_path / "r.html", "--json").stdout)
    student, baseline = found["models"][1:]
    assert "alpha" in student and not {"alpha", "cache", "tokens_per_second", "train_seconds"} & baseline.keys()
    assert "train_student_seconds" in found["phases"] and "train_baseline_seconds" not in found["phases"]
    assert baseline["curves"] == {} and student["curves"]["loss"]


def test_dtype_is_that_of_the_model_and_told(root, found, tmp_path):
    arguments = evaluation(root, "--report", tmp_path / "r.html")
    some = json.loads(cli(*arguments, "--dtype", "bfloat16", "--device-map", "auto", "--json").stdout)
    assert [model["dtype"] for model in some["models"]] == ["float32", "bfloat16"]
    assert [model["dtype"] for model in found["models"]] == ["float32"] * 5
    assert some["models"][1]["forward_kl"] == pytest.approx(found["models"][1]["forward_kl"], rel=0.02)
    assert some["models"][1]["forward_kl"] != found["models"][1]["forward_kl"]
    assert "parameters, bfloat16" in (tmp_path / "r.html").read_text()


def test_prompts_of_a_split(root, tmp_path):
    from datasets import Dataset, DatasetDict

    splits = {name: Dataset.from_list([{"prompt": f"the {name}", "completion": "cat"}]) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "prompts")
    arguments = evaluation(root, "--prompts", tmp_path / "prompts")
    arguments += ["--max-new-tokens", 4, "--json"]
    for flags, prompt in (([], "the train"), (["--split", "test"], "the test")):
        found = json.loads(cli(*arguments, *flags).stdout)
        assert [one["prompt"] for one in found["generations"]["prompts"]] == [prompt]


def test_prompts_without_room_are_found_before_any_model_is_loaded(root, tmp_path):
    """The student's weights are missing, which is found when it is loaded, after the teacher was measured."""
    shutil.copytree(root / "kd", tmp_path / "kd")
    (tmp_path / "kd" / "model.safetensors").unlink()
    arguments = ["evaluate", "--student", tmp_path / "kd", "--teacher-cache", root / "held"]
    assert "cannot be loaded" in cli(*arguments, code=1).stderr
    told = cli(*arguments, "--prompts", root / "prompts.jsonl", "--max-new-tokens", 255, code=1).stderr
    assert "prompt 0 has" in told and f"the context of {tmp_path / 'kd'} is 256" in told


# --- the page ---------------------------------------------------------------------------------------------------------


class Elements(html.parser.HTMLParser):
    """Names and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.all = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def named(self, tag):
        return [attributes for name, attributes in self.all if name == tag]


def expected_marks(found):
    """Circles and points of lines that the page must hold."""
    models = found["models"]
    binned = sum(len(m[key]) for m in models if m["role"] != "teacher" for key in ("kl_by_context", "kl_by_entropy"))
    held = sum(len(m["curves"].get(f"eval_{key}", [])) for m in models[1:] for key in ("loss", "cross_entropy"))
    return binned + held + sum(len(m["calibration"]) for m in models)


def check_content(page, found):
    assert len(page.named("circle")) == expected_marks(found)
    curves = sum(key in m["curves"] for m in found["models"][1:] for key in ("loss", "cross_entropy"))
    held = sum(f"eval_{key}" in m["curves"] for m in found["models"][1:] for key in ("loss", "cross_entropy"))
    assert len(page.named("polyline")) == 4 + 4 + 5 + curves + held
    assert all(svg["aria-label"] and svg["role"] == "img" for svg in page.named("svg"))
    assert len([s for s in page.named("span") if "data-said" in s]) == len(found["strip"]["tokens"])


def test_nothing_hostile_and_nothing_from_elsewhere(root, found):
    text = (root / "report.html").read_text()
    page = Elements(text)
    check_content(page, found)
    assert not {"script", "img", "link", "iframe", "b", "object"} & {name for name, _ in page.all}
    assert not any(key.startswith("on") for _, attributes in page.all for key in attributes)
    assert not any({"src", "href", "action"} & attributes.keys() for _, attributes in page.all)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert "&lt;script&gt;" in text and "report &lt;b&gt;" in text
    assert {meta.get("name") for meta in page.named("meta")} >= {"viewport", "color-scheme"}


def browse(page: Path, folder: Path, *flags):
    """Chromium on a page; what it wrote."""
    done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()],
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


@needs_chromium
def test_in_a_browser(root, found, tmp_path):
    dom, errors = browse(root / "report.html", tmp_path, "--dump-dom")
    assert errors == []
    check_content(Elements(dom), found)
    assert "<title>owned" not in dom
    broken = tmp_path / "broken.html"
    broken.write_text("<script>throw Error('seen')</script>")
    assert browse(broken, tmp_path, "--dump-dom")[1], "errors of a page that has some are seen"


@needs_chromium
@pytest.mark.parametrize("width", [390, 1100])
def test_fits_its_window(root, tmp_path, width):
    text = re.sub(r"<meta http-equiv[^>]*>", "", (root / "report.html").read_text())
    ask = "<script>parent.document.body.dataset.widths = [innerWidth, document.documentElement.scrollWidth, "
    ask += "...[...document.querySelectorAll('svg,figure,.strip,.answers')].map(e => Math.ceil(e.getBoundingClientRect().right))]</script>"
    inside = html.escape(text.replace("</body>", ask + "</body>"))
    frame = tmp_path / "frame.html"  # a window cannot be as narrow as a telephone, a frame can
    frame.write_text(f'<body><iframe width="{width}" height="900" style="border:0" srcdoc="{inside}"></iframe></body>')
    dom, _ = browse(frame, tmp_path, "--dump-dom", "--window-size=1300,900")
    inner, scrolled, *rights = map(int, re.search(r'data-widths="([\d,]+)"', dom)[1].split(","))
    assert inner == width
    assert scrolled <= inner and max(rights) <= inner


@needs_chromium
def test_is_drawn_light_and_dark(root, tmp_path):
    from PIL import Image

    means = []
    for flags in ((), ("--blink-settings=preferredColorScheme=0",)):
        shot = tmp_path / "shot.png"
        browse(root / "report.html", tmp_path, f"--screenshot={shot}", "--window-size=390,4000", *flags)
        pixels = np.asarray(Image.open(shot).convert("L"), dtype=float)
        assert len(np.unique(pixels)) > 50 and pixels.std() > 5
        means.append(np.median(pixels))
    assert means[0] > 200 > 60 > means[1]


# --- refused ----------------------------------------------------------------------------------------------------------

BAD = [
    (["--report", "/no/such/r.html"], "No such file or directory", "mkdir -p /no/such"),
    (["--report", "{root}"], "a file was expected, found a folder", "report.html"),
    (["--full", "{root}/kd"], "--full is the far end of a gap", "--baseline"),
    (["--prompts", "/no/prompts.jsonl"], "no such file", None),
    (["--prompts", "{root}/bare.jsonl"], "nothing to hold the answers against", "--teacher"),
    (["--prompts", "{root}/some.jsonl"], "row 1 has no reference", "completion"),
    (["--prompts", "{root}/prompts.jsonl", "--max-new-tokens", "255"], "prompt 0 has", "--max-new-tokens"),
    (["--teacher-cache", "{root}/cache"], "not to measure a divergence", "--targets hidden"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(root):
    (root / "bare.jsonl").write_text('{"prompt": "the cat"}\n')
    (root / "some.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": ""}\n')


@pytest.mark.parametrize(("arguments", "message", "hint"), BAD)
def test_bad_input_is_one_clear_error(root, bad, arguments, message, hint):
    held = [] if "--teacher-cache" in arguments else ["--teacher-cache", root / "held"]
    refused = cli("evaluate", "--student", root / "kd", *held, *(a.format(root=root) for a in arguments), code=1)
    assert message in refused.stderr
    assert hint is None or hint in refused.stderr.split("hint:")[1]


def test_tasks_need_lm_eval(root, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    refused = cli("evaluate", "--student", root / "kd", "--teacher-cache", root / "held", "--tasks", "piqa", code=1)
    assert "lm-eval" in refused.stderr and "pip install 'kdcache[eval]'" in refused.stderr


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["cat", "dog"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.filterwarnings("ignore")
def test_tasks_of_ones_own(root, tmp_path, tiny_teacher):
    pytest.importorskip("lm_eval")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"question": f"the {w} saw a", "answer": i % 2}) + "\n" for i, w in enumerate("abcd")))  # fmt: skip
    (tmp_path / "mine.yaml").write_text(TASK.format(name="my_pets", data=tmp_path / "data.jsonl"))
    arguments = evaluation(root, "--tasks", tmp_path / "mine.yaml")
    out = cli(*arguments, "--teacher", tiny_teacher, "--report", tmp_path / "r.html", "--json")
    for model in json.loads(out.stdout)["models"]:
        assert 0 <= model["tasks"]["my_pets"]["acc"]["value"] <= 1
        assert model["tasks"]["my_pets"]["acc"]["stderr"] is not None
    assert "my_pets, acc" in (tmp_path / "r.html").read_text()
    (tmp_path / "mine.yaml").write_text(TASK.format(name="my_pets", data=tmp_path / "none.jsonl"))
    assert "cannot be read" in cli(*arguments, code=1).stderr
    assert "no_such_task: lm-eval does not know it" in cli(*arguments[:-1], "no_such_task", code=1).stderr
    (tmp_path / "mine.yaml").write_text("[]")
    assert "YAML with a name under task:" in cli(*arguments, code=1).stderr
