"""A causal language model and its tokenizer, loaded from where ``model_files`` finds them.

A tokenizer is described by content, :func:`describe_tokenizer`: what it does to text, whatever its name.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from kdcache.errors import CacheMismatchError, ConfigError, ModelError
from kdcache.model_files import ModelSource
from kdcache.specs import TokenizerSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROBE_TEXT = "The quick brown fox doesn't jump 1,234 times.\n\n  def f(x): return x**2  # Zürich, 東京 🙂\tend"


# --- loading ----------------------------------------------------------------------------------------------------------


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The model's transformers config."""
    from transformers import AutoConfig

    with _load_errors(source):
        return AutoConfig.from_pretrained(
            source.folder_or_name, trust_remote_code=trust_remote_code, **source.load_arguments
        )


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    attention: str = "auto",
    device: str = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM in eval mode on its device.

    Args:
        source: Where it is.
        dtype: Of weights and activations.
        attention: ``attn_implementation`` of transformers; ``auto`` is what transformers takes for the family.
        device: Where to put it, unless ``device_map`` spreads it.
        device_map: ``auto``, ``balanced`` ... for a model larger than one GPU.
        trust_remote_code: Run code that ships with the model.

    Raises:
        ModelError: It cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    arguments: dict[str, Any] = {**source.load_arguments, "dtype": dtype, **_attention(attention)}
    if source.gguf_file:
        arguments |= _dequantized()
    if source.untrusted:
        arguments["use_safetensors"] = True
    if device_map is not None:
        arguments["device_map"] = device_map
    with _load_errors(source), quiet_progress():
        model = AutoModelForCausalLM.from_pretrained(
            source.folder_or_name, trust_remote_code=trust_remote_code, **arguments
        )
    if source.adapter:
        model = _merge_adapter(model, source)
    if device_map is None:
        model.to(device)
        if device == "cpu" and dtype == torch.bfloat16:
            _warn_about_bfloat16()
    # A GGUF file loads as plain weights; without its quantization note the model can be saved like any other.
    if source.gguf_file and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
    return model.eval()


@cache
def _warn_about_bfloat16() -> None:
    """Once a process, where bfloat16 is computed by way of float32. Processors that cannot be asked are taken to have it."""
    import torch

    asked = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    if platform.machine() in ("x86_64", "AMD64") and not any(one is None or one() for one in asked):
        logger.warning(
            "this CPU has no bfloat16 (AVX-512 BF16 or AMX): float32 is two to three times as fast here, in twice the memory"
        )


def _merge_adapter(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(
            f"adapter {source.adapter} needs the peft package", hint="pip install 'kdcache[lora]'"
        ) from error
    with _load_errors(source), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers 5 in the words of transformers 4
        try:
            merged: PreTrainedModel = PeftModel.from_pretrained(model, source.adapter).merge_and_unload()
        except RuntimeError as error:  # sizes that do not fit the base model
            raise ValueError(str(error)) from error
    for parameter in merged.parameters():  # peft froze the base
        parameter.requires_grad_(parameter.is_floating_point())
    return merged


def describe_model(source: ModelSource, config: Any, attention: str = "auto") -> tuple[int, str]:
    """Number of parameters, and the attention that ``auto`` stands for; without weights.

    Raises:
        ModelError: The family does not know this attention.
    """
    model = meta_model(source, config, attention)
    return sum(parameter.numel() for parameter in model.parameters()), str(model.config._attn_implementation)


def meta_model(source: ModelSource, config: Any, attention: str = "auto") -> PreTrainedModel:
    """A model with shapes and no weights.

    Raises:
        ModelError: There is no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with _load_errors(source), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **_attention(attention))
    return model


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, a fast one where there is one."""
    from transformers import AutoTokenizer

    with _load_errors(source):
        return AutoTokenizer.from_pretrained(
            source.folder_or_name, trust_remote_code=trust_remote_code, **source.load_arguments
        )


def _attention(attention: str) -> dict[str, Any]:
    return {} if attention == "auto" else {"attn_implementation": attention}


def _dequantized() -> dict[str, Any]:
    """Transformers >= 5.2 keeps GGUF weights packed unless told; older releases know only plain weights."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


class _load_errors:
    """Turn what transformers raises for a model that is not there into a ModelError."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ImportError) and "gguf" in str(error):
            raise ModelError(
                f"model {self.source.name}: reading GGUF needs the gguf package", hint="pip install 'kdcache[gguf]'"
            ) from error
        if isinstance(error, OSError | ValueError | KeyError | ImportError) and not isinstance(error, MemoryError):
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"model {self.source.name}: cannot be loaded: {first}") from error


class quiet_progress:
    """Hold back transformers' own progress bars: kdcache shows one of its own."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self._was_enabled = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as hf_logging

        if self._was_enabled:
            hf_logging.enable_progress_bar()


def answer_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Tokens that end an answer, as generation config and tokenizer have them, and the token that fills up shorter rows."""
    told = None if model.generation_config is None else model.generation_config.eos_token_id
    end_ids = {told} if isinstance(told, int) else set(told or ())
    end_ids |= {tokenizer.eos_token_id} - {None}
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(end_ids, default=0)
    return sorted(end_ids), pad_id


def rows_without_token(model: PreTrainedModel, vocab_size: int) -> list[int] | None:
    """Padded rows of the output head, past the ``vocab_size`` tokens that there are: for ``suppress_tokens`` of ``generate``, which would sample them."""
    return list(range(vocab_size, model.config.get_text_config().vocab_size)) or None


# --- tokenizer --------------------------------------------------------------------------------------------------------


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> TokenizerSpec:
    """The tokenizer's content, whatever its name: vocabulary, what it does to a fixed text, chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    vocab_digest = _hash(vocabulary)
    probe = tokenizer(PROBE_TEXT, add_special_tokens=True)["input_ids"]
    template = tokenizer.chat_template
    return TokenizerSpec(
        digest=_hash([vocab_digest, probe]),
        vocab_digest=vocab_digest,
        num_tokens=vocabulary[-1][1] + 1,
        chat_template=None if template is None else _hash(template),
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=True).encode()).hexdigest()[:32]


def check_student(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cached: TokenizerSpec, vocab_size: int, seq_len: int
) -> None:
    """Refuse a student that does not speak a cache's tokens, or cannot read its sequences.

    Args:
        model: The student.
        tokenizer: The student's.
        cached: The tokenizer of the cache.
        vocab_size: V of the cache.
        seq_len: Its longest sequence.

    Raises:
        CacheMismatchError: Another tokenizer, fewer embeddings than the cache has tokens, or a shorter context; both values
            are named.
    """
    student = describe_tokenizer(tokenizer)
    if student.digest != cached.digest:
        raise CacheMismatchError(
            f"cache and student use different tokenizers: cache {cached.digest[:12]} ({cached.num_tokens} tokens), student "
            f"{student.digest[:12]} ({student.num_tokens} tokens): {_tokenizer_difference(student, cached)}",
            hint="make the student with kdcache init-student, which copies the teacher's tokenizer, or dump a teacher that "
            "has the student's",
        )
    width = model.get_input_embeddings().weight.shape[0]
    if width < vocab_size:
        raise CacheMismatchError(
            f"the cache has {vocab_size} tokens, the student's embedding only {width} rows",
            hint=f"student.resize_token_embeddings({vocab_size})",
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and context < seq_len:
        raise CacheMismatchError(
            f"the cache has sequences of up to {seq_len} tokens, the student's context is {context}",
            hint="use a student with a longer context, or dump with a smaller --seq-len",
        )


def _tokenizer_difference(student: TokenizerSpec, cached: TokenizerSpec) -> str:
    if student.vocab_digest == cached.vocab_digest:
        return "same vocabulary, but they cut text differently"
    if student.num_tokens == cached.num_tokens:
        return "same size, different map"
    longer = "student" if student.num_tokens > cached.num_tokens else "cache"
    difference = abs(student.num_tokens - cached.num_tokens)
    return f"the {longer}'s has {difference} token{'s' if difference > 1 else ''} more"


# --- process ----------------------------------------------------------------------------------------------------------


def pick_device(device: str = "auto") -> str:
    """``auto`` is the first CUDA GPU where there is one, else the CPU.

    Raises:
        ConfigError: No such device here.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device}: {str(error).splitlines()[0]}",
            hint="auto takes a GPU where there is one, and else the CPU",
        ) from error
    return device


def parse_dtype(name: str, config: Any = None) -> torch.dtype:
    """``float32``, ``bfloat16``, ``float16``, or ``auto``: what the model's config says.

    Raises:
        ModelError: No such dtype.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        found = (getattr(config, "dtype", None) if config is not None else None) or torch.float32
        return dtypes.get(str(found).removeprefix("torch."), torch.float32)
    if name not in dtypes:
        raise ModelError(f"dtype {name!r}: expected auto, {', '.join(dtypes)}")
    return dtypes[name]


def keep_freed_memory() -> None:
    """Let glibc keep what it has once taken from the system.

    Every training step on a CPU takes and returns tensors of hundreds of megabytes; by default each is mapped afresh, and
    the page faults cost as much as the arithmetic (1.3 to 2 times the step, measured). Linux with glibc only; the resident
    size then stays at its peak.
    """
    if sys.platform != "linux" or os.environ.get("MALLOC_MMAP_THRESHOLD_"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt: Callable[[int, int], int] = libc.mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    for parameter, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 512 << 20)):
        mallopt(parameter, value)


def free_memory() -> None:
    """Give the memory of models that nobody holds any more back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
