"""Random tokens and targets for property tests, plain float64 oracles, and small caches on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kdcache.cache.commit import commit_shard, publish_plan, seal
from kdcache.cache.manifest import CacheSpec, Commit, Plan, ShardStats, derive_manifest, to_json
from kdcache.cache.shard import ShardBuilder
from kdcache.cache.store import LocalStore
from kdcache.targets import SparseTargets, TokenSequence

settings.register_profile(
    "kdcache",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kdcache")

VOCAB_SIZES = (50, 300, 49_152, 70_000, 131_073, 152_064, 256_000, 1 << 20)
TAILS = (0.0, 1e-30, 1e-9, 1e-3, 0.3, 0.9, 0.99)


# --- float64 oracles --------------------------------------------------------------------------------------------------


def log_softmax(z: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    z = z.astype(np.float64)
    shifted = z - z.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def targets_from_logits(
    logits: np.ndarray, labels: np.ndarray, k: int, temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
) -> SparseTargets:
    """Top-k targets of ``[N, V]`` logits by the plain formulas in float64."""
    n = len(logits)
    logp = log_softmax(logits)
    ids = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :k], axis=1)
    left_out = np.ones(logits.shape, dtype=bool)
    np.put_along_axis(left_out, ids, False, axis=1)
    with np.errstate(divide="ignore"):
        tails = [np.log(np.where(left_out, np.exp(log_softmax(logits / t)), 0).sum(1)) for t in temperatures]
    top = logits.max(1)
    return SparseTargets(
        temperatures=temperatures,
        num_entries=np.full(n, k, dtype=np.uint32),
        token_ids=ids.ravel().astype(np.uint32),
        logprobs=np.take_along_axis(logp, ids, axis=1).ravel().astype(np.float32),
        tail_logprobs=np.stack(tails, axis=1).astype(np.float32),
        logz=(top + np.log(np.exp(logits - top[:, None]).sum(1))).astype(np.float32),
        label_logprobs=logp[np.arange(n), labels].astype(np.float32),
        entropy=-(np.exp(logp) * logp).sum(1).astype(np.float32),
    )


def zipf_logits(rng: np.random.Generator, n: int, vocab_size: int, noise: float = 1.0) -> np.ndarray:
    """``[N, V]`` logits of a peaked, long-tailed distribution, as language models have them."""
    rank = np.log(np.arange(1, vocab_size + 1))
    sharpness = rng.uniform(1.3, 3.0, size=(n, 1))
    logits = rng.normal(size=(n, vocab_size)) * noise
    for row, slope in zip(logits, sharpness, strict=True):
        row[rng.permutation(vocab_size)] -= slope * rank
    return logits.astype(np.float32)


def per_position(targets: SparseTargets, values: np.ndarray) -> list[np.ndarray]:
    """The entries of each position."""
    return np.split(values, targets.offsets[1:-1])


# --- strategies -------------------------------------------------------------------------------------------------------

vocab_sizes = st.sampled_from(VOCAB_SIZES)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def token_sequences(draw: st.DrawFn, vocab_size: int = 300, max_positions: int = 40) -> TokenSequence:
    """One or several documents, with any mask that the rule allows."""
    count = draw(st.integers(1, max_positions))
    starts = {0} | set(draw(st.lists(st.integers(0, count - 1), max_size=4)))
    rng = np.random.default_rng(draw(seeds))
    mask = rng.random(count) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    mask[sorted(starts)] = False
    ids = rng.integers(0, vocab_size, size=count)
    ids[-1] = vocab_size - 1
    return TokenSequence(ids.astype(np.uint32), mask, np.array(sorted(starts), dtype=np.uint32))


@st.composite
def sparse_targets(
    draw: st.DrawFn, vocab_size: int, num_targets: int | None = None, max_entries: int = 70
) -> SparseTargets:
    """True distributions with any number of entries a position, ties, and tails from nothing to nearly everything."""
    n = draw(st.integers(0, 12)) if num_targets is None else num_targets
    temperatures = draw(st.sampled_from([(1.0,), (1.0, 2.0), (1.0, 2.0, 4.0)]))
    grain = draw(st.sampled_from([0.0, 0.01, 1.0]))
    width = draw(st.sampled_from([0.1, 2.0, 12.0]))
    counts = draw(st.lists(st.integers(0, min(max_entries, vocab_size)), min_size=n, max_size=n))
    masses = draw(st.lists(st.sampled_from(TAILS), min_size=n, max_size=n))
    rng = np.random.default_rng(draw(seeds))
    ids, logprobs, tails = [], [], []
    for count, mass in zip(counts, masses, strict=True):
        chosen = np.sort(rng.choice(vocab_size, size=count, replace=False))
        if count:
            chosen[-1] = vocab_size - 1
        score = -rng.uniform(0, width, size=count)
        score = np.round(score / grain) * grain if grain else score
        ids.append(chosen)
        logprobs.append(log_softmax(score) + np.log1p(-mass) if count else score)
        other = rng.uniform(1e-6, 0.999, size=len(temperatures) - 1) * (mass > 0)
        with np.errstate(divide="ignore"):
            tails.append(np.log([mass, *other]) if count else np.zeros(len(temperatures)))
    return SparseTargets(
        temperatures=temperatures,
        num_entries=np.array(counts, dtype=np.uint32),
        token_ids=np.concatenate([np.zeros(0), *ids]).astype(np.uint32),
        logprobs=np.concatenate([np.zeros(0), *logprobs]).astype(np.float32),
        tail_logprobs=np.array(tails, dtype=np.float32).reshape(n, len(temperatures)),
        logz=rng.normal(10, 5, size=n).astype(np.float32),
        label_logprobs=-rng.uniform(0, 20, size=n).astype(np.float32),
        entropy=rng.uniform(0, np.log(vocab_size), size=n).astype(np.float32),
    )


def frequencies_of(drawn: np.ndarray, entropy: float, label_logprobs: np.ndarray | None = None) -> SparseTargets:
    """Targets of which only the counts are kept, from the token ids ``[N, num_draws]`` that were drawn; the plain form."""
    n, num_draws = drawn.shape
    pairs = [np.unique(row, return_counts=True) for row in drawn]
    counts = np.concatenate([count for _, count in pairs])
    return SparseTargets(
        temperatures=(1.0,),
        num_entries=np.array([len(ids) for ids, _ in pairs], dtype=np.uint32),
        token_ids=np.concatenate([ids for ids, _ in pairs]).astype(np.uint32),
        logprobs=np.log(counts / num_draws).astype(np.float32),
        tail_logprobs=np.full((n, 1), -np.inf, dtype=np.float32),
        logz=np.zeros(n, dtype=np.float32),
        label_logprobs=np.full(n, -1, dtype=np.float32) if label_logprobs is None else label_logprobs,
        entropy=np.full(n, entropy, dtype=np.float32),
        counts=counts.astype(np.uint16)[:, None],
        frequencies=True,
    )


# --- small caches -----------------------------------------------------------------------------------------------------

DIGEST = "0123456789abcdef" * 2
VOCAB_SIZE, ENTRIES = 300, 8


def make_spec(**changes: object) -> CacheSpec:
    """A spec; ``changes`` are dotted names with ``__`` for the dot."""
    fields: dict = {
        "teacher": {"name": "teacher", "digest": DIGEST, "dtype": "float32", "attention": "sdpa",
                    "vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_parameters": 1000},
        "tokenizer": {"digest": DIGEST, "vocab_digest": DIGEST, "num_tokens": VOCAB_SIZE, "chat_template": None},
        "corpus": {"dataset": "corpus", "digest": DIGEST, "split": "train", "num_rows": 10, "columns": "text",
                   "text_column": "text", "seq_len": 64, "packing": False, "append_eos": True, "assistant_only": False},
        "targets": {"scheme": "top_k", "k": ENTRIES, "temperatures": [1.0, 2.0]},
        "codec": {"name": "packed", "step": 0.0645, "growth": 0.3, "max_kl": 1e-3},
        "compute": {"device": "cpu", "threads": 1, "batch_tokens": 1024, "chunk_positions": 256},
        "rows_per_shard": 3,
    }  # fmt: skip
    for name, value in changes.items():
        *path, last = name.split("__")
        inner = fields
        for key in path:
            inner = inner[key]
        inner[last] = value
    return CacheSpec.model_validate(fields)


def make_plan(**changes: object) -> Plan:
    """A plan of four shards, unless changed."""
    spec = make_spec(**changes)
    return Plan(spec=spec, fingerprint=spec.fingerprint, environment={"python": "3.12", "torch": "2.8"})


def make_row(plan: Plan, index: int) -> tuple[TokenSequence, SparseTargets]:
    """Row ``index`` of the corpus: a pure function of it, aligned."""
    rng = np.random.default_rng(index)
    spec = plan.spec
    count = int(rng.integers(2, spec.corpus.seq_len // 2))
    mask = rng.random(count) < 0.8
    mask[0] = False
    ids = rng.integers(0, spec.teacher.vocab_size, size=count).astype(np.uint32)
    sequence = TokenSequence(ids, mask, np.zeros(1, dtype=np.uint32))
    labels = ids[1:][mask[1:]].astype(np.int64)
    logits = zipf_logits(rng, len(labels), spec.teacher.vocab_size)
    # the label is likely, as it is for a teacher that has learned
    logits[np.arange(len(labels)), labels] = logits.max(1, initial=0) - rng.exponential(1.0, size=len(labels))
    return sequence, targets_from_logits(logits, labels, spec.targets.k, spec.targets.temperatures)


def build_shard(plan: Plan, shard: int) -> tuple[memoryview, ShardStats]:
    """Bytes and statistics of a shard: a pure function of plan and number."""
    builder = ShardBuilder(plan.spec.make_codec(), plan.fingerprint, shard)
    rows = [make_row(plan, index) for index in plan.spec.rows(shard)]
    for sequence, targets in rows:
        builder.add(sequence, targets)
    stats = ShardStats(
        num_rows=len(rows),
        num_rows_skipped=0,
        num_rows_truncated=0,
        num_rows_split=0,
        num_sequences=len(rows),
        num_positions=sum(len(sequence) for sequence, _ in rows),
        num_targets=sum(len(targets) for _, targets in rows),
        num_entries=sum(len(targets.token_ids) for _, targets in rows),
        sum_tail_mass=float(sum(np.exp(targets.tail_logprobs[:, 0], dtype=np.float64).sum() for _, targets in rows)),
        sum_entropy=float(sum(targets.entropy.sum(dtype=np.float64) for _, targets in rows)),
        sum_label_nll=float(sum(-targets.label_logprobs.sum(dtype=np.float64) for _, targets in rows)),
        num_kl_targets=0,
        sum_codec_kl=0.0,
    )
    return memoryview(builder.finish()), stats


def put_shard(store: LocalStore, plan: Plan, shard: int, worker: str = "worker-0") -> bool:
    """Build and commit one shard."""
    data, stats = build_shard(plan, shard)
    return commit_shard(store, plan, shard, data, stats, worker=worker, seconds=1.2345)


def write_records(root: Path, num_shards: int) -> LocalStore:
    """Plan and manifest of a sealed cache of so many shards, 8 sequences each, that are not there."""
    store, plan = LocalStore(root), make_plan(corpus__num_rows=num_shards * 8, rows_per_shard=8)
    stats = ShardStats(**dict.fromkeys(ShardStats.model_fields, 8))
    commits = [
        Commit(plan=plan.fingerprint, shard=i, digest=f"{i:032x}", num_bytes=1000, stats=stats, worker="w",
               finished_at="2026-01-01T00:00:00+00:00", seconds=1.0)
        for i in range(num_shards)
    ]  # fmt: skip
    store.replace("plan.json", to_json(plan))
    store.replace("manifest.json", to_json(derive_manifest(plan, commits)))
    return store


def write_cache(root: Path, plan: Plan | None = None) -> LocalStore:
    """A finished, sealed cache."""
    store, plan = LocalStore(root), plan or make_plan()
    publish_plan(store, plan)
    for shard in range(plan.spec.num_shards):
        put_shard(store, plan, shard)
    seal(store)
    return store


def all_files(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
