"""Every pipeline, at reduced size and with tiny models: the commands of its run.sh, one after the other, in this process."""

import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from kdcache.cli import main

PIPELINES = Path(__file__).parents[2] / "pipelines"
NAMES = sorted(folder.parent.name for folder in PIPELINES.glob("*/run.sh"))
SMALL = {"max_steps": 2, "warmup_steps": 0, "bf16": False, "per_device_train_batch_size": 2}
# A stand-in that writes down what it was asked for: the commands of a run depend on nothing that they do.
RECORDER = '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >> "$COMMANDS"\nprintf "\\n" >> "$COMMANDS"\n'


def commands(folder: Path, output: Path, tmp_path: Path) -> list[list[str]]:
    """What ``run.sh`` asks of kdcache, in order."""
    recorder, log = tmp_path / "bin" / "kdcache", tmp_path / "commands"
    recorder.parent.mkdir()
    recorder.write_text(RECORDER)
    recorder.chmod(recorder.stat().st_mode | stat.S_IEXEC)
    environment = os.environ | {"PATH": f"{recorder.parent}:{os.environ['PATH']}", "COMMANDS": str(log), "SMALL": "1"}
    subprocess.run(["bash", str(folder / "run.sh"), str(output)], check=True, env=environment, capture_output=True)
    return [line.split("\0")[:-1] for line in log.read_text().split("\n") if line]


def tiny(folder: Path, teacher: str, dataset: str) -> None:
    """The same story about a tiny teacher."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for section in config.values():
        for name, value in {"teacher": teacher, "from": teacher, "dataset": dataset}.items():
            if name in section:
                section[name] = value
        section.update({"dtype": "float32"} if "dtype" in section else {})
        section.update({"seq_len": 96} if "seq_len" in section else {})
        section.update({"max_new_tokens": 8, "chat": False} if "max_new_tokens" in section else {})
    if "shape" in config.get("init-student", {}):
        config["init-student"]["shape"] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                                           "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    config.get("train-student", {}).update(SMALL)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama_70b_to_8b"])
def test_every_command_runs(name, tmp_path, tiny_teacher, corpus_file, monkeypatch):
    folder, output = tmp_path / "pipelines" / name, tmp_path / "output"
    shutil.copytree(PIPELINES / name, folder)
    shutil.copy(PIPELINES / "prompts.jsonl", folder.parent)
    rows = [line for line in Path(corpus_file).read_text().splitlines() if line]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows * (1 + 60 // len(rows))) + "\n")
    tiny(folder, tiny_teacher, str(tmp_path / "rows.jsonl"))
    asked = commands(folder, output, tmp_path)
    monkeypatch.chdir(output)
    for arguments in asked:
        arguments = [
            "--layers" if a == "--layers" else "1" if before == "--layers" else a
            for before, a in zip(["", *arguments], arguments, strict=False)
        ]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, f"kdcache {' '.join(arguments)}\n{done.output}"
    # Again: what is done stays done, so that a story that was cut off can be told once more.
    again = CliRunner().invoke(main, asked[1] if asked[0][0] in ("plan", "init-student") else asked[0])
    assert "all done" in again.output


def test_the_70b_story_is_planned_without_weights(tmp_path, monkeypatch):
    output = tmp_path / "output"
    (asked, *others) = commands(PIPELINES / "llama_70b_to_8b", output, tmp_path)
    assert others == [], "without LAUNCH nothing but the plan"
    monkeypatch.chdir(output)
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    printed = " ".join(done.output.split())
    told = (PIPELINES / "README.md").read_text()
    for figure in ("70,553,706,496", "8,030,261,248", "800 GB", "2,028 GPU-hours"):
        assert figure in printed
        assert figure in told
    found = json.loads(CliRunner().invoke(main, [*asked, "--json"]).output)
    gib = {who: sum(line["num_bytes"] for line in found[who]["lines"]) / 2**30 for who in ("teacher", "student")}
    assert round(gib["teacher"]) == 76
    assert "76 GiB" in told
    assert round(gib["student"]) == 21


LAUNCHERS = {
    "kdcache": '[ "$1 ${CUDA_VISIBLE_DEVICES:-}" != "dump-teacher ${FAILS:-}" ]',
    "torchrun": "",
    "srun": "",
    # What Slurm 22.05 prints: the path as it was given, and the arguments after it.
    "scontrol": 'printf "JobId=7 JobName=run.sh\\n   UserId=me(1)\\n   Command=%s OUTPUT\\n   WorkDir=/\\n" "$SUBMITTED"',
}


def launch(script: Path, tmp_path: Path, **environment: str) -> tuple[int, str]:
    """Exit code of the 70B story, and what it asked for of stand-ins for kdcache and the launchers."""
    (tmp_path / "bin").mkdir()
    for tool, does in LAUNCHERS.items():
        stand_in = tmp_path / "bin" / tool
        stand_in.write_text(f'#!/usr/bin/env bash\necho "{tool} $*" >> "$LOG"\n{does}\n')
        stand_in.chmod(0o755)
    environment |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    done = subprocess.run(["bash", str(script), str(tmp_path / "out")], env=os.environ | environment, cwd=PIPELINES)
    return done.returncode, (tmp_path / "log").read_text()


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_the_70b_story_launches(launcher, tmp_path):
    """Both variants: every part of the story is asked for, with the files that lie beside the script."""
    script, submitted = PIPELINES / "llama_70b_to_8b/run.sh", "./llama_70b_to_8b/run.sh"
    if launcher == "srun":  # sbatch runs a copy
        (tmp_path / "spool/job00007").mkdir(parents=True)
        script = Path(shutil.copy(script, tmp_path / "spool/job00007/slurm_script"))
    code, asked = launch(script, tmp_path, LAUNCH=launcher, SLURM_JOB_ID="7", SUBMITTED=submitted)
    assert code == 0
    configs = re.findall(r"--(?:teacher-|student-)?config (\S+)", asked)
    assert set(configs) == {
        f"{PIPELINES}/llama_70b_to_8b/{name}" for name in ("config.yaml", "llama-3.1-70b", "llama-3.1-8b")
    }
    assert asked.count("dump-teacher") == (8 if launcher == "torchrun" else 2)
    assert asked.count("-m kdcache train-student") == 1
    assert re.search(rf"^{launcher} .*nproc-per-node 8|^{launcher} --ntasks-per-node 1 ", asked, re.MULTILINE)
    assert asked.count("kdcache evaluate") == 1


def test_a_worker_of_the_70b_story_that_fails_stops_it(tmp_path):
    """Not before the others are through with their shards, though."""
    script = PIPELINES / "llama_70b_to_8b/run.sh"
    code, asked = launch(script, tmp_path, LAUNCH="torchrun", FAILS="2,3")
    assert code == 1
    assert asked.count("dump-teacher") == 4 and "train-student" not in asked


def test_one_node_of_the_70b_story_evaluates(tmp_path):
    script = PIPELINES / "llama_70b_to_8b/run.sh"
    code, asked = launch(script, tmp_path, LAUNCH="torchrun", NNODES="2", NODE_RANK="1", RDZV="node:29500")
    assert code == 0
    assert "--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node:29500 -m kdcache train" in asked
    assert "kdcache evaluate" not in asked


@pytest.mark.parametrize("name", NAMES)
def test_run_sh_is_short_and_plain(name):
    script = (PIPELINES / name / "run.sh").read_text()
    assert script.count("\n") <= 40
    assert "python" not in script
    assert f"| `{name}`" in (PIPELINES / "README.md").read_text()
