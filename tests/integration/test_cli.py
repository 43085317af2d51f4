"""The command line: the whole story on a tiny teacher, help, bad input, start-up, and docs that cannot drift."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdcache.cli import COMMANDS, main
from tests.conftest import validates_configs

ROOT = Path(__file__).parents[2]


def cli(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


@pytest.fixture(scope="module")
def story(tmp_path_factory, tiny_teacher, corpus_file):
    """Everything that the commands make, once."""
    root = tmp_path_factory.mktemp("story")
    common = ["--teacher", tiny_teacher, "--dataset", corpus_file, "--seq-len", 64]
    out = {"dump": cli("dump-teacher", *common, "--output", root / "cache", "--split", "train[:75%]", "--top-k", 16)}
    out["held"] = cli(
        "dump-teacher", *common, "--output", root / "held", "--split", "train[75%:]", "--targets", "hidden"
    )
    out["init"] = cli("init-student", "--from", tiny_teacher, "--output", root / "init",
                      "--shape", "hidden_size=16", "--shape", "num_hidden_layers=1")  # fmt: skip
    training = ["train-student", "--cache", root / "cache", "--student", root / "init", "--max-steps", 4,
                "--per-device-train-batch-size", 4]  # fmt: skip
    out["train"] = cli(*training, "--output", root / "kd", "--eval-cache", root / "held")
    out["labels"] = cli(*training, "--output", root / "ce", "--alpha", 0)
    return root, common, out


def test_the_story(story):
    _, _, out = story
    assert "tokens in" in out["dump"].stdout
    assert "of the mass kept" in out["dump"].stdout
    assert "parameters, random weights" in out["init"].stdout
    assert "held out: loss" in out["train"].stdout


def test_running_again_is_done_at_once(story):
    root, common, _ = story
    again = cli("dump-teacher", *common, "--output", root / "cache", "--split", "train[:75%]", "--top-k", 16)
    assert "all done" in again.stdout
    assert "all done" in cli("train-student", "--cache", root / "cache", "--student", root / "init", "--max-steps", 4,
                             "--per-device-train-batch-size", 4, "--output", root / "ce", "--alpha", 0).stdout  # fmt: skip


def test_a_changed_argument_is_refused_with_old_and_new(story):
    root, common, _ = story
    refused = cli("dump-teacher", *common, "--output", root / "cache", "--split", "train[:75%]", "--top-k", 8, code=1)
    assert "targets.k: the cache has 16, this run asks for 8" in refused.stderr
    assert "hint:" in refused.stderr


def test_inspect(story):
    root, _, _ = story
    about = json.loads(cli("inspect", root / "cache", "--json").stdout)
    assert about["complete"] is True
    assert 0 < about["mass_captured"] <= 1
    assert "bytes per token" in cli("inspect", root / "cache").stdout
    shown = json.loads(cli("inspect", root / "cache", "--sequence", 0, "--json").stdout)
    assert all(row["choices"][0][1] >= row["choices"][1][1] for row in shown)
    assert "->" in cli("inspect", root / "cache", "--sequence", 0, "--positions", 3).stdout
    cli("inspect", root / "cache", "--sequence", 10_000, code=2)


def test_verify(story, tmp_path):
    import shutil

    root, _, _ = story
    assert json.loads(cli("verify", root / "cache", "--json").stdout)["intact"]
    copy = tmp_path / "copy"
    shutil.copytree(root / "cache", copy)
    shard = sorted((copy / "shards").iterdir())[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    damaged = cli("verify", copy, code=1)
    assert "damaged: shard 00000" in damaged.stdout
    shutil.copytree(root / "cache", tmp_path / "holes")
    (tmp_path / "holes" / "manifest.json").unlink()
    sorted((tmp_path / "holes" / "commits").iterdir())[-1].unlink()
    assert "missing: 1 shards" in cli("verify", tmp_path / "holes", code=3).stdout


def test_evaluate(story, tmp_path):
    root, _, _ = story
    arguments = ["evaluate", "--student", root / "kd", "--baseline", root / "ce", "--teacher-cache", root / "held"]
    report = json.loads(cli(*arguments, "--json", "--output", tmp_path / "r.json").stdout)
    teacher, student, baseline = report["models"]
    assert (teacher["forward_kl"], teacher["top1_agreement"]) == (0.0, 1.0)
    assert student["forward_kl"] > 0
    assert baseline["alpha"] == 0
    assert json.loads((tmp_path / "r.json").read_text()) == report
    table = cli(*arguments).stdout
    assert "perplexity" in table
    assert "bytes a token" in table


def test_init_student_by_layers(story, tiny_teacher, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = cli("init-student", "--from", tiny_teacher, "--layers", 1, "--output", tmp_path / "cut",
              "--calibration-tokens", 64).stdout  # fmt: skip
    assert "layers [1]" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert model.config.num_hidden_layers == 1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "cut")) == model.config.vocab_size


BAD = [
    (["dump-teacher"], "--teacher is needed"),
    (["dump-teacher", "--teacher", "/no/such", "--dataset", "d", "--output", "o"], "no such folder"),
    (["dump-teacher", "--teacher", "{teacher}", "--dataset", "/no/such.jsonl", "--output", "{tmp}/c"], "no such file"),
    (["dump-teacher", "--teacher", "{teacher}", "--dataset", "{corpus}", "--output", "{tmp}/c", "--seq-len", "4096"],
     "longer than the teacher's context"),
    (["dump-teacher", "--teacher", "{teacher}", "--dataset", "{corpus}", "--output", "{tmp}/c", "--temperatures", "0"],
     "above 0"),
    (["dump-teacher", "--teacher", "{teacher}", "--dataset", "{corpus}", "--output", "{tmp}/c", "--split", "train[:1]",
      "--text-column", "body"], "column 'body'"),
    (["dump-teacher", "--teacher", "{teacher}", "--dataset", "{corpus}", "--output", "{corpus}", "--seq-len", "64"],
     "cannot list the folder"),
    (["dump-teacher", "--teacher", "{teacher}", "--dataset", "{corpus}", "--output", "{teacher}", "--seq-len", "64"],
     "not a cache and not empty"),
    (["dump-teacher", "--teacher", "{teacher}", "--dataset", "{corpus}", "--output", "{tmp}/c", "--device", "tpu",
      "--seq-len", "64"],
     "device tpu"),
    (["dump-teacher", "--teacher", "{teacher}", "--dataset", "{corpus}", "--output", "{tmp}/c", "--temperatures", "a,b"],
     "numbers separated by commas"),
    (["dump-teacher", "--teacher", "{teacher}", "--dataset", "{corpus}", "--output", "{tmp}/c", "--attention", "none_such"],
     "cannot be loaded"),
    (["train-student", "--cache", "/no/cache", "--student", "{teacher}", "--output", "{tmp}/o"], "not a kdcache cache"),
    (["dump-teacher", "--teacher", "{teacher}", "--dataset", "none.jsonl", "--output", "{tmp}/c"], "no such file"),
    (["train-student", "--cache", "{cache}", "--student", "/no/such", "--output", "{tmp}/o"], "no such folder"),
    (["train-student", "--cache", "{cache}", "--student", "{teacher}", "--output", "{tmp}/o", "--temperature", "3"],
     "not declared"),
    (["init-student", "--from", "{teacher}", "--output", "{tmp}/o"], "--layers and --shape"),
    (["init-student", "--from", "{teacher}", "--output", "{tmp}/o", "--layers", "99"], "the teacher has 2"),
    (["init-student", "--from", "{teacher}", "--output", "{tmp}/o", "--shape", "hiden_size=16"], "did you mean hidden_size"),
    pytest.param(["init-student", "--from", "{teacher}", "--output", "{tmp}/o", "--shape", "hidden_size=33"],
                 "no such llama model", marks=validates_configs),
    (["init-student", "--from", "{teacher}", "--output", "{tmp}/o", "--shape", "hidden_size=abc"], "hidden_size"),
    (["init-student", "--from", "{teacher}", "--output", "{teacher}", "--layers", "1"], "is the teacher itself"),
    (["train-student", "--cache", "{cache}", "--student", "{teacher}", "--output", "{cache}"], "is a cache"),
    (["train-student", "--cache", "{cache}", "--student", "{teacher}", "--output", "{tmp}/o", "--report-to", "paper"],
     "report_to paper"),
    (["evaluate", "--student", "{teacher}", "--teacher-cache", "/no/cache"], "not a kdcache cache"),
    (["evaluate", "--student", "/no/such", "--teacher-cache", "{held}"], "no such folder"),
    (["evaluate", "--student", "{teacher}", "--teacher-cache", "{held}", "--output", "/no/such/r.json"],
     "/no/such/r.json: No such file or directory"),
    (["inspect", "/no/cache"], "not a kdcache cache"),
    (["verify", "/no/cache"], "not a kdcache cache"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_clear_error(story, tmp_path, tiny_teacher, corpus_file, arguments, message):
    root, _, _ = story
    places = {
        "teacher": tiny_teacher,
        "corpus": corpus_file,
        "tmp": tmp_path,
        "cache": root / "cache",
        "held": root / "held",
    }
    refused = cli(*(part.format(**places) for part in arguments), code=1)
    assert message in refused.stderr + refused.stdout
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.output
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").glob("shards/*"))


def test_config_file_and_unknown_keys(story, tmp_path):
    root, _, _ = story
    config = tmp_path / "run.yaml"
    config.write_text(f"train-student:\n  cache: {root / 'cache'}\n  learning_rte: 0.1\n")
    refused = cli("train-student", "--config", config, code=1)
    assert "no option 'learning_rte'" in refused.stderr
    assert "did you mean 'learning_rate'?" in refused.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_stands_in_the_readme(command):
    assert "Usage:" in cli(command, "--help").stdout
    assert f"kdcache {command}" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["inspect", "CACHE"], ["verify", "CACHE"], ["dump-teacher", "--help"]]
)
def test_start_up_without_torch(story, arguments):
    root, _, _ = story
    code = (
        "import sys\nfrom kdcache.cli import main\n"
        f"try: main({[a.replace('CACHE', str(root / 'cache')) for a in arguments]!r})\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_done_is_said_without_torch(story):
    root, common, _ = story
    arguments = [
        "dump-teacher",
        *map(str, common),
        "--output",
        str(root / "cache"),
        "--split",
        "train[:75%]",
        "--top-k",
        "16",
    ]
    code = (
        f"import sys\nfrom kdcache.cli import main\ntry: main({arguments!r})\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "all done" in done.stdout


def test_public_names():
    import kdcache

    assert kdcache.__all__ == sorted(kdcache.__all__)
    for name in kdcache.__all__:
        assert getattr(kdcache, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kdcache.no_such_name
