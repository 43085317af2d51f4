"""The variant of E10 in which the label stands for the tail: its gradient, and on which text it is that of the teacher."""

import pytest
import torch

from benchmarks.label_tail import add_loss
from kdcache.train import head
from kdcache.train.head import kd_loss
from kdcache.train.losses import LOSSES
from kdcache.train.objective import BucketTargets, Objective

V, K = 20, 6


@pytest.fixture(autouse=True)
def loss(monkeypatch):
    monkeypatch.setattr(head, "chunk_loss", head.chunk_loss)
    monkeypatch.setitem(LOSSES, "label_tail", None)  # both are undone afterwards
    add_loss()


@pytest.fixture
def student():
    torch.manual_seed(0)
    return torch.randn(1, V, dtype=torch.float64)


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    return torch.softmax(2 * torch.randn(V, dtype=torch.float64), 0)


def gradients_by_label(student, teacher, unused=0):
    """``[V, V]``: of a student at one position, for each label that may stand there, through ``kd_loss``."""
    top = teacher.topk(K).indices.sort().values
    ids = torch.cat([top, top[:1].expand(unused)])
    logprobs = torch.cat([teacher[top].log(), torch.full((unused,), -torch.inf, dtype=teacher.dtype)])
    tail = (1 - teacher[top].sum()).log()
    logits = student.expand(V, V).clone().requires_grad_()
    targets = BucketTargets(ids.expand(V, -1), logprobs.expand(V, -1), tail.expand(V))
    sums = kd_loss(logits, targets, torch.arange(V), Objective(1.0, 1.0, LOSSES["label_tail"]()))
    return torch.autograd.grad(sums.loss, logits)[0], top


@pytest.mark.parametrize("unused", [0, 2])
def test_the_gradient_is_that_of_the_weights(student, teacher, unused):
    found, top = gradients_by_label(student, teacher, unused)
    tau = torch.zeros(V, V, dtype=teacher.dtype)
    tau[:, top] = teacher[top]
    labels_outside = [label for label in range(V) if label not in top.tolist()]
    tau[labels_outside, labels_outside] = 1.0
    logits = student.expand(V, V).clone().requires_grad_()
    plain = torch.autograd.grad(-(tau * torch.log_softmax(logits, 1)).sum(), logits)[0]
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


def test_on_text_of_the_teacher_its_expectation_is_the_whole_gradient(student, teacher):
    found, _ = gradients_by_label(student, teacher)
    whole = torch.softmax(student[0], 0) - teacher
    torch.testing.assert_close(teacher @ found, whole, rtol=0, atol=1e-12)


def test_on_other_text_it_is_not(student, teacher):
    found, top = gradients_by_label(student, teacher)
    data = torch.softmax(torch.arange(V, dtype=teacher.dtype) / 4, 0)
    whole = torch.softmax(student[0], 0) - teacher
    tail = data.index_fill(0, top, 0.0)
    towards = teacher.index_fill(0, torch.tensor([i for i in range(V) if i not in top.tolist()]), 0.0) + tail
    torch.testing.assert_close(data @ found, towards.sum() * torch.softmax(student[0], 0) - towards, rtol=0, atol=1e-12)
    assert (data @ found - whole).abs().max() > 0.05
