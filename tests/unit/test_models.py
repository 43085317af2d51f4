"""Where a model is found, its two parts, packing, its tokenizer's description."""

import json
import os
import shutil

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kdcache.errors import ModelError
from kdcache.models import (
    OutputHead,
    check_packing,
    describe_model,
    describe_tokenizer,
    find_model,
    head_of,
    hidden_states,
    load_config,
    load_model,
    load_tokenizer,
    model_digest,
    parse_dtype,
    pick_device,
    split_is_exact,
    trunk_of,
)
from tests.conftest import VOCAB_SIZE, make_llama, make_tokenizer

# --- where a model is -------------------------------------------------------------------------------------------------


def test_a_folder_and_a_hub_name(tiny_teacher):
    assert find_model(tiny_teacher).folder_or_name == tiny_teacher
    assert find_model("HuggingFaceTB/SmolLM2-135M", "main").load_arguments == {"revision": "main"}


def test_a_gguf_file_is_named_by_folder_and_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    source = find_model(str(tmp_path / "m.gguf"))
    assert (source.folder_or_name, source.load_arguments) == (str(tmp_path), {"gguf_file": "m.gguf"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{tmp}/none", "no such folder or file"),
        ("./none", "no such folder or file"),
        ("a/b/c", "no such folder or file"),
        ("{tmp}/none.gguf", "no such file"),
        ("{tmp}", "it has no config.json"),
        ("package:no_such_package_of_models", "is not installed"),
        ("package:json", "one .gguf file was expected"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_loaded(tmp_path, name, message):
    with pytest.raises(ModelError, match=message):
        find_model(name.format(tmp=tmp_path))


def test_a_folder_with_a_gguf_file_says_to_name_it(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError) as caught:
        find_model(str(tmp_path))
    assert caught.value.hint == "name the .gguf file itself"


def test_a_hub_name_without_a_network_is_one_clear_error():
    source = find_model("no-such-user/no-such-model")
    for load in (model_digest, load_config, load_tokenizer):
        with pytest.raises(ModelError, match="no-such-user/no-such-model"):
            load(source)


def test_a_broken_folder_is_one_clear_error(tmp_path, tiny_teacher):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no_such_family"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_config(find_model(str(broken)))
    shutil.copy(f"{tiny_teacher}/config.json", broken)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(find_model(str(broken)), dtype=torch.float32)


def test_the_digest_follows_weights_and_config_but_not_the_place(tmp_path, tiny_teacher):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_teacher, copy)
    digest = model_digest(find_model(tiny_teacher))
    assert model_digest(find_model(str(copy))) == digest
    (copy / "README.md").write_text("a card")
    assert model_digest(find_model(str(copy))) == digest
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert model_digest(find_model(str(copy))) != digest


# --- trunk and head ---------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8, "pad_token_id": 0},
    "gemma2": {"head_dim": 8, "pad_token_id": 0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25, "pad_token_id": 0},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "olmo2": {},
    "phi": {},
    "stablelm": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1},
}


def build(family, **changes):
    own = {k: v for k, v in SMALL.items() if not (family in ("gpt2",) and k in ("hidden_size", "num_hidden_layers"))}
    config = AutoConfig.for_model(family, **(own | FAMILIES[family] | changes))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_trunk_and_head_give_the_models_own_logits(family):
    model = build(family)
    assert split_is_exact(model)
    torch.manual_seed(1)
    ids = torch.randint(2, 96, (3, 20))
    positions = torch.arange(20).expand(3, -1)
    with torch.no_grad():
        own = model(input_ids=ids).logits
        ours = head_of(model).logits(hidden_states(model, ids, positions).reshape(60, -1)).view_as(own)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    assert own.std() > 0.05, "logits that say something"


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other_or_are_refused(family):
    """What check_packing lets pass really is isolated: changing the first document leaves the second as it was."""
    model = build(family)
    try:
        check_packing(model)
    except ModelError:
        assert family not in ("llama", "mistral", "qwen2", "qwen3", "gemma2"), "the common families must pack"
        return
    torch.manual_seed(2)
    ids = torch.randint(2, 96, (1, 24))
    other = torch.cat([torch.randint(2, 96, (1, 11)), ids[:, 11:]], dim=1)
    positions = torch.cat([torch.arange(11), torch.arange(13)])[None]
    with torch.no_grad():
        one, two = (hidden_states(model, x, positions)[0, 11:] for x in (ids, other))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_model_that_mixes_documents_is_refused():
    """A model that looks at the sum of all tokens before it, whatever the position ids say."""
    model = build("llama")
    trunk = trunk_of(model)
    forward = trunk.forward

    def leaking(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state.cumsum(1)
        return out

    trunk.forward = leaking
    with pytest.raises(ModelError, match="lets packed documents see each other") as caught:
        check_packing(model)
    assert "--no-packing" in caught.value.hint


def test_a_model_that_packs_only_in_batches_of_one_is_refused():
    """As flash attention does: with more than one row, position ids that restart go unnoticed."""
    model = build("llama")
    trunk = trunk_of(model)
    forward = trunk.forward

    def careless(input_ids, position_ids, **kwargs):
        if len(input_ids) > 1:
            kwargs["attention_mask"] = torch.ones_like(input_ids)
        return forward(input_ids=input_ids, position_ids=position_ids, **kwargs)

    trunk.forward = careless
    with pytest.raises(ModelError, match="lets packed documents see each other"):
        check_packing(model)


def test_a_head_that_is_not_understood_shows():
    """What multiplies its logits in a way that no config field says does not pass for exact."""
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 1.5)
    assert not split_is_exact(model)
    assert split_is_exact(build("llama"))


def test_testing_a_model_leaves_its_mode_alone():
    model = build("llama").train()
    assert split_is_exact(model)
    check_packing(model)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"scale": 0.25, "softcap": 30.0}])
def test_a_head_travels_as_bytes(dtype, extras):
    torch.manual_seed(0)
    given = extras | ({"bias": torch.randn(40).to(dtype)} if extras.get("bias") else {})
    head = OutputHead(torch.randn(40, 8).to(dtype), **given)
    back = OutputHead.from_bytes(head.to_bytes())
    hidden = torch.randn(5, 8)
    assert torch.equal(back.logits(hidden), head.logits(hidden))
    assert back.to_bytes() == head.to_bytes()


def test_the_first_rows_of_a_head_give_the_first_logits():
    torch.manual_seed(0)
    head = OutputHead(torch.randn(40, 8), torch.randn(40), 0.5, 20.0)
    hidden = torch.randn(5, 8)
    torch.testing.assert_close(head.first(33).logits(hidden), head.logits(hidden)[:, :33])


def test_attention_is_what_the_family_has(tmp_path):
    """Gemma 2 has no sdpa in transformers 5; a fixed default would refuse it."""
    for family in ("llama", "gemma2"):
        model = build(family)
        about = (sum(p.numel() for p in model.parameters()), model.config._attn_implementation)
        assert describe_model(find_model("x"), model.config) == about
    with pytest.raises(ModelError, match="no_such_attention"):
        describe_model(find_model("x"), build("llama").config, "no_such_attention")


def test_a_loaded_model_is_in_eval_mode(tiny_teacher):
    assert not load_model(find_model(tiny_teacher), dtype=torch.float32).training


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_described_by_content_not_by_name(tmp_path):
    spec = describe_tokenizer(make_tokenizer())
    assert spec.num_tokens == VOCAB_SIZE
    make_tokenizer().save_pretrained(tmp_path)
    assert describe_tokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path)) == spec


def test_what_changes_ids_changes_the_digest():
    spec = describe_tokenizer(make_tokenizer())
    more = make_tokenizer()
    more.add_tokens(["<extra>"])
    assert describe_tokenizer(more).num_tokens == spec.num_tokens + 1
    assert describe_tokenizer(more).vocab_digest != spec.vocab_digest

    raw = json.loads(make_tokenizer().backend_tokenizer.to_str())
    raw["normalizer"] = {"type": "Lowercase"}
    from tokenizers import Tokenizer

    lower = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)))
    assert describe_tokenizer(lower).vocab_digest == spec.vocab_digest
    assert describe_tokenizer(lower).digest != spec.digest, "the same map, another way to cut text"


def test_the_chat_template_is_described_apart():
    other = make_tokenizer()
    other.chat_template = "{{ messages }}"
    one, two = describe_tokenizer(make_tokenizer()), describe_tokenizer(other)
    assert one.digest == two.digest
    assert one.chat_template != two.chat_template


# --- process ----------------------------------------------------------------------------------------------------------


def test_dtypes(tmp_path):
    folder = make_llama(tmp_path / "m")
    assert parse_dtype("bfloat16") == torch.bfloat16
    assert parse_dtype("auto", load_config(find_model(folder))) == torch.float32
    assert parse_dtype("auto") == torch.float32
    with pytest.raises(ModelError, match="dtype 'fp8'"):
        parse_dtype("fp8")


def test_a_device_that_is_named_is_taken():
    assert pick_device("cuda:1") == "cuda:1"
    assert pick_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_nothing_here_reaches_the_network():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
