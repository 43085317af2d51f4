"""What a GPU computes is what a CPU computes: the loss, the selection, and a dump and a student from end to end.

Run by ``make test-gpu``; everything else in ``tests`` looks at the CPU alone.
"""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from kdcache.cache.reader import open_cache
from kdcache.cli import main
from kdcache.dump.draw import position_uniforms
from kdcache.dump.select import select
from kdcache.heads import OutputHead
from kdcache.specs import TargetSpec
from kdcache.train.head import kd_loss
from kdcache.train.losses import LOSSES, make_divergence
from kdcache.train.objective import BucketTargets, FullTargets, Objective

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")

N, D, V, K = 300, 64, 5000, 32
SCHEMES = {
    "top_k": {"k": 32},
    "top_p": {"k": 64, "top_p": 0.9},
    "sampled": {"num_draws": 50},
    "systematic": {"num_draws": 25},
    "hybrid": {"k": 8, "num_draws": 16},
    "hidden": {},
}


def a_case():
    """Hidden states, head, labels, and a teacher of full rank, on the CPU."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D), torch.randn(V, D) / 4
    return hidden, weight, torch.randint(0, V, (N,)), torch.randn(N, D), torch.randn(V, D) / 4


def targets_of(kind, states, teacher_head, temperature, device):
    if kind == "full":
        return FullTargets(states.to(device), OutputHead(teacher_head.to(device)), temperature)
    logprobs = torch.log_softmax(states @ teacher_head.T / temperature, 1)
    ids = logprobs.topk(K).indices.sort(1).values
    tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(1)
    ratios = torch.full((N, K), 1.5) if kind == "draws" else None
    parts = (ids, logprobs.gather(1, ids), tail, ratios)
    return BucketTargets(*(None if part is None else part.to(device) for part in parts), temperature=temperature)


@pytest.mark.parametrize("kind", ["buckets", "draws", "full"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"contrastive", "ce", "renormalised"}))
def test_loss_and_gradients_are_those_of_the_cpu(name, temperature, kind):
    hidden, weight, labels, states, teacher_head = a_case()
    divergence = make_divergence(name)
    if kind == "draws" and divergence.on_draws is None:
        pytest.skip("refused from draws")
    found = {}
    for device in ("cpu", "cuda"):
        x, w = (part.clone().to(device).requires_grad_() for part in (hidden, weight))
        targets = targets_of(kind, states, teacher_head, temperature, device)
        objective = Objective(0.7, temperature, divergence)
        sums = kd_loss(x, targets, labels.to(device), objective, head=OutputHead(w), chunk_positions=128)
        sums.loss.backward()
        found[device] = [part.cpu() for part in (sums.loss.detach(), sums.flat(), x.grad, w.grad)]
    for ours, plain in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_selection_is_that_of_the_cpu(scheme):
    torch.manual_seed(0)
    logits, labels = torch.randn(N, V) * 3, torch.randint(0, V, (N,))
    spec = TargetSpec(scheme=scheme, temperatures=(1.0, 2.0), **({"k": 0} | SCHEMES[scheme]))
    uniforms = None
    if "num_draws" in SCHEMES[scheme]:
        uniforms = torch.from_numpy(position_uniforms(spec, 0, np.ones(N, dtype=bool)))
    cpu = select(logits.clone(), labels, spec, uniforms)
    gpu = select(logits.cuda(), labels.cuda(), spec, None if uniforms is None else uniforms.cuda())
    for name in ("logz", "tail_logprobs", "label_logprobs", "entropy"):
        ours, plain = getattr(gpu, name).cpu(), getattr(cpu, name)
        # A draw within rounding of the border between two tokens may fall to either.
        same = (
            (gpu.num_entries.cpu() == cpu.num_entries) if scheme in ("sampled", "systematic", "hybrid") else slice(None)
        )
        assert ours[same].shape[0] >= 0.99 * N
        torch.testing.assert_close(ours[same], plain[same], rtol=1e-4, atol=1e-4)
    if scheme == "top_k":
        assert torch.equal(gpu.token_ids.cpu(), cpu.token_ids)


def run(*arguments):
    outcome = CliRunner().invoke(main, ["-q", *map(str, arguments)])
    assert outcome.exit_code == 0, outcome.output
    return outcome


def dump(teacher, corpus, output, *more):
    run("dump-teacher", "--teacher", teacher, "--dataset", corpus, "--seq-len", 64, "--top-k", 16, "--dtype", "float32",
        "--codec", "exact", "--shard-positions", 500, "--output", output, *more)  # fmt: skip
    return open_cache(output)


def test_a_cache_from_a_gpu_holds_what_the_cpu_says(tiny_teacher, corpus_file, tmp_path):
    gpu = dump(tiny_teacher, corpus_file, tmp_path / "gpu", "--device", "cuda")
    cpu = dump(tiny_teacher, corpus_file, tmp_path / "cpu", "--device", "cpu")
    assert len(gpu) == len(cpu) > 5
    for index in range(len(gpu)):
        ours, plain = gpu[index].targets, cpu[index].targets
        assert np.array_equal(gpu[index].sequence.input_ids, cpu[index].sequence.input_ids)
        np.testing.assert_allclose(ours.label_logprobs, plain.label_logprobs, atol=1e-3)
        np.testing.assert_allclose(ours.tail_logprobs, plain.tail_logprobs, atol=1e-3)


def test_dumps_on_a_gpu_repeat_to_the_byte(tiny_teacher, corpus_file, tmp_path):
    first = dump(tiny_teacher, corpus_file, tmp_path / "one", "--device", "cuda")
    second = dump(tiny_teacher, corpus_file, tmp_path / "two", "--device", "cuda")
    digests = [cache.manifest.shards.digest for cache in (first, second)]
    assert digests[0] == digests[1]
    assert len(digests[0]) > 1


def train(cache, student, output, *more):
    run("train-student", "--cache", cache, "--student", student, "--output", output, "--logging-steps", 1, *more)
    device = json.loads((output / "train-student.provenance.json").read_text())["device"]
    assert device.startswith("cuda")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["forward_kl"] for line in lines if "forward_kl" in line]


@pytest.mark.parametrize(("precision", "bound"), [((), 1e-4), (("--bf16",), 0.05)])
def test_the_teacher_is_its_own_student_on_a_gpu(tiny_teacher, corpus_file, tmp_path, precision, bound):
    dump(tiny_teacher, corpus_file, tmp_path / "cache", "--device", "cuda")
    kl = train(tmp_path / "cache", tiny_teacher, tmp_path / "student", "--max-steps", 1, *precision)
    assert len(kl) == 1
    assert -1e-6 < kl[0] < bound


def test_a_student_on_a_gpu_learns(tiny_teacher, tiny_student, corpus_file, tmp_path):
    dump(tiny_teacher, corpus_file, tmp_path / "cache", "--device", "cuda")
    kl = train(tmp_path / "cache", tiny_student, tmp_path / "student", "--max-steps", 30, "--learning-rate", 3e-3)
    assert len(kl) == 30
    assert np.mean(kl[-5:]) < np.mean(kl[:5]) - 0.03
