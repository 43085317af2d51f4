"""P9: every family of causal LMs that transformers can build small, dumped and trained, without packing.

A random teacher of each family goes through ``dump-teacher`` (its cache is held against the model's own log-softmax), and a
student of the same family through ``train-student`` on that cache. The table says whether logits came a chunk at a time (the
head is understood) or whole (it is not, and the result is still right), whether packing is possible, and how far off the cache is.

    python benchmarks/prove_families.py [--only llama,gpt2]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import results_file
from kdcache.cache.reader import open_cache
from kdcache.dump.launch import dump
from kdcache.dump.options import DumpOptions
from kdcache.errors import KDCacheError
from kdcache.heads import check_packing, split_is_exact
from kdcache.train.options import TrainOptions
from kdcache.train.run import train
from tests.conftest import VOCAB_SIZE, make_tokenizer, texts
from tests.strategies import log_softmax

SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "d_model": 32, "n_embd": 32, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "num_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128, "head_dim": 8,
    "rotary_dim": 4, "word_embed_proj_dim": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "sliding_window": 128, "final_logit_softcapping": 5.0, "logit_scale": 0.25, "logits_scaling": 4.0,
}  # fmt: skip
# What a small shape needs besides, family by family.
OWN: dict[str, dict] = {
    "deepseek_v2": {"num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 1},
    "exaone4": {"sliding_window_pattern": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
}
UNKNOWN = {"falcon": ("head_dim",)}
FAMILIES = [
    "apertus", "arcee", "bloom", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "falcon", "gemma",
    "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe",
    "helium", "hunyuan_v1_dense", "llama", "minimax", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt",
    "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
]  # fmt: skip


def build(family: str, folder: Path) -> str:
    """A random model of a family with the tests' tokenizer."""
    default = AutoConfig.for_model(family)
    given = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    given = {name: value for name, value in given.items() if getattr(default, name) is not None or name.endswith("_id")}
    # Dropout would make a student differ from the teacher that it is equal to.
    given |= {name: 0.0 for name, value in default.to_dict().items() if "drop" in name and isinstance(value, float)}
    given = {name: value for name, value in given.items() if name not in UNKNOWN.get(family, ())}
    given |= OWN.get(family, {})
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **given)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def check(family: str, root: Path, corpus: str) -> str:
    """Dump, compare, train; one row of the table."""
    name = build(family, root / family)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    exact = split_is_exact(model)
    try:
        check_packing(model)
        packs = "yes"
    except KDCacheError:
        packs = "refused"
    cache = str(root / f"{family}-cache")
    dump(
        DumpOptions(
            teacher=name, dataset=corpus, output=cache, seq_len=64, packing=False, top_k=8, codec="exact", device="cpu"
        )
    )
    worst = 0.0
    for row in open_cache(cache):
        ids = torch.from_numpy(row.sequence.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            own = log_softmax(model(input_ids=ids).logits[0].double().numpy()[:, :VOCAB_SIZE])[row.sequence.target_mask]
        where = np.repeat(np.arange(len(own)), row.targets.num_entries)
        worst = max(worst, float(np.abs(own[where, row.targets.token_ids] - row.targets.logprobs).max()))
    assert worst < 1e-3, f"{family}: the cache differs from the model's own logits by {worst}"
    out = root / f"{family}-out"
    train(TrainOptions(cache=cache, student=name, output=str(out), max_steps=3, learning_rate=1e-3, logging_steps=1,
                       per_device_train_batch_size=4))  # fmt: skip
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    # The student is the teacher: what it is told is what it says already.
    assert abs(first["forward_kl"]) < 1e-3, f"{family}: a student equal to its teacher has KL {first['forward_kl']}"
    return f"| {family} | {'a chunk at a time' if exact else 'whole'} | {packs} | {worst:.0e} | {first['forward_kl']:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated families")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    families = args.only.split(",") if args.only else [f for f in FAMILIES if f in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    lines = [
        "| family | logits | packing | cache off by (nats) | KL of the teacher as student |",
        "|---|---|---|---|---|",
    ]
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = root / "texts.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(8)))
        for family in families:
            try:
                lines.append(check(family, root, str(corpus)))
            except Exception as error:  # noqa: BLE001 - a family that fails is a row of the table, and fails the proof below
                failed.append(family)
                lines.append(f"| {family} | {type(error).__name__}: {str(error).splitlines()[0][:90]} | | | |")
            print(lines[-1], file=sys.stderr, flush=True)
    results_file.write_text("prove_families", "P9: families of causal LMs", "\n".join(lines) + "\n")
    assert not failed, f"failed: {failed}"


if __name__ == "__main__":
    main()
