"""Selection against the plain form in float64."""

import pytest
import torch

from kdcache.dump.select import select_top_k


def plain(logits, labels, k, temperatures):
    """What select_top_k equals."""
    z = logits.double()
    logp = torch.log_softmax(z, -1)
    ids = z.topk(k).indices
    tails = []
    for temperature in temperatures:
        scaled = torch.log_softmax(z / temperature, -1)
        tails.append(scaled.scatter(1, ids, -torch.inf).logsumexp(1))
    return {
        "ids": ids.sort(1).values,
        "logprobs": logp.gather(1, ids.sort(1).values),
        "tail": torch.stack(tails, 1),
        "logz": z.logsumexp(1),
        "label": logp.gather(1, labels[:, None])[:, 0],
        "entropy": -(logp.exp() * logp).sum(1),
    }


def check(logits, k, temperatures, *, atol=2e-5):
    torch.manual_seed(1)
    labels = torch.randint(0, logits.shape[1], (len(logits),))
    expected = plain(logits, labels, k, temperatures)
    found = select_top_k(logits.clone(), labels, k=k, temperatures=temperatures)
    # where logits tie, any of the tied tokens may be kept: compare values, not names
    kept = logits.double().gather(1, found.token_ids).sort(1).values
    torch.testing.assert_close(kept, logits.double().gather(1, expected["ids"]).sort(1).values, rtol=0, atol=0)
    assert (found.token_ids.diff(dim=1) > 0).all(), "ids ascend and do not repeat"
    close = {"rtol": 0, "atol": atol}
    logp = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(found.logprobs.double(), logp.gather(1, found.token_ids), **close)
    torch.testing.assert_close(found.tail_logprobs.double(), expected["tail"], **close)
    torch.testing.assert_close(found.logz.double(), expected["logz"], rtol=1e-6, atol=atol)
    torch.testing.assert_close(found.label_logprobs.double(), expected["label"], **close)
    torch.testing.assert_close(found.entropy.double(), expected["entropy"], rtol=0, atol=5e-5)
    return found


def logits(n, vocab, dtype=torch.float32, spread=3.0):
    torch.manual_seed(0)
    return (torch.randn(n, vocab) * spread).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [100, 513, 4099])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_equals_the_plain_form(dtype, vocab, k):
    check(logits(19, vocab, dtype), k, (1.0, 2.0, 4.0))


def test_a_real_vocabulary():
    check(logits(9, 49_152, torch.bfloat16), 64, (1.0, 2.0, 4.0))


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 3.0), (1.0, 0.5, 2.0), (1.0, 1.5, 4.0, 8.0)])
def test_any_set_of_temperatures(temperatures):
    check(logits(11, 700), 5, temperatures)


def test_everything_kept_leaves_no_tail():
    torch.manual_seed(0)
    found = select_top_k(logits(7, 60), torch.zeros(7, dtype=torch.long), k=60, temperatures=(1.0, 2.0))
    assert (found.tail_logprobs == -torch.inf).all()
    torch.testing.assert_close(found.logprobs.exp().sum(1), torch.ones(7))


def test_nothing_kept_is_all_tail():
    found = select_top_k(logits(7, 600), torch.zeros(7, dtype=torch.long), k=0, temperatures=(1.0, 2.0))
    assert found.token_ids.shape == (7, 0)
    torch.testing.assert_close(found.tail_logprobs, torch.zeros(7, 2))
    torch.testing.assert_close(found.logz, logits(7, 600).logsumexp(1))


@pytest.mark.parametrize("offset", [-80.0, 80.0, 1000.0])
def test_huge_logits_neither_overflow_nor_vanish(offset):
    check(logits(9, 300) + offset, 8, (1.0, 2.0, 4.0), atol=3e-4 if abs(offset) == 1000 else 5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_either_sign_and_the_rows_beside_change_nothing(dtype):
    """Rows whose largest logits are negative, mixed or positive; -0.0 and 0.0 among them."""
    values = logits(4, 5000).abs()
    mixed = torch.cat([-values, values[:, :20], torch.zeros(4, 3), -torch.zeros(4, 3)], 1)
    values = torch.cat([-values, values], 1)[:, : mixed.shape[1]]
    rows = torch.stack([values, mixed, -values.abs()], 1).flatten(0, 1).to(dtype)
    together = check(rows, 32, (1.0, 2.0))
    for i in range(len(rows)):
        assert torch.equal(check(rows[i : i + 1], 32, (1.0, 2.0)).token_ids[0], together.token_ids[i])


def test_a_tail_of_1e_minus_30_is_as_exact_as_any():
    """Never 1 - sum: that would be zero here."""
    z = torch.full((1, 1000), -72.0)
    z[0, :4] = torch.tensor([0.0, -0.5, -1.0, -1.5])
    found = check(z, 4, (1.0, 2.0), atol=1e-4)
    assert -66 < float(found.tail_logprobs[0, 0]) < -64


def test_ties_at_the_edge_are_broken_alike_every_time():
    z = torch.zeros(5, 2000)
    z[:, 1000:] = 1.0
    labels = torch.zeros(5, dtype=torch.long)
    first = select_top_k(z.clone(), labels, k=16, temperatures=(1.0,))
    again = select_top_k(z.clone(), labels, k=16, temperatures=(1.0,))
    assert torch.equal(first.token_ids, again.token_ids)
    assert (first.token_ids >= 1000).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    z = logits(3, 200)
    z[1, 17] = bad
    found = select_top_k(z, torch.zeros(3, dtype=torch.long), k=4, temperatures=(1.0, 2.0))
    assert not torch.isfinite(found.logz[1] + found.entropy[1] + found.label_logprobs[1])
    assert torch.isfinite(found.logz[[0, 2]]).all()
