"""A model in two parts, in fourteen families; packed documents; heads as bytes."""

import json
import pickle

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdcache.errors import CacheCorruptError, ModelError
from kdcache.heads import OutputHead, check_packing, head_of, hidden_states, split_is_exact, trunk_of

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


def test_a_head_of_another_shape_is_refused():
    """A cache of hidden states whose table is another model's head."""
    data = OutputHead(torch.ones(5, 3)).to_bytes()
    assert OutputHead.from_bytes(data, (5, 3)).weight.shape == (5, 3)
    for shape in ((5, 4), (6, 3)):
        with pytest.raises(CacheCorruptError, match=r"weight \(\d, \d\) was expected, found \(5, 3\)"):
            OutputHead.from_bytes(data, shape)


@pytest.mark.parametrize(
    "tensors",
    [
        {"scale": torch.ones(1)},
        {"weight": torch.ones(4, 2)},
        {"weight": torch.ones(8), "scale": torch.ones(1)},
        {"weight": torch.ones(4, 2, dtype=torch.int32), "scale": torch.ones(1)},
        {"weight": torch.ones(4, 2), "scale": torch.ones(3)},
        {"weight": torch.ones(4, 2), "scale": torch.ones(1), "bias": torch.ones(5)},
        {"weight": torch.ones(4, 2), "scale": torch.ones(1), "softcap": torch.ones(2)},
        {"weight": torch.ones(4, 2), "scale": torch.ones(1), "other": torch.ones(1)},
        {"weight": torch.ones(4, 2), "scale": torch.ones(1) * 1j},
        {"weight": torch.ones(4, 2), "scale": torch.ones(1, dtype=torch.int64)},
        {"weight": torch.ones(4, 2), "scale": torch.ones(1), "bias": torch.ones(4) * 1j},
    ],
)
def test_a_file_that_holds_no_head_is_refused(tensors):
    with pytest.raises(CacheCorruptError, match="were expected, found"):
        OutputHead.from_bytes(safetensors.torch.save(tensors))


@pytest.mark.parametrize(("dtype", "num_bytes"), [("F4", 8), ("F6_E2M3", 12), ("F8_E8M0", 16)])
def test_a_dtype_that_torch_does_not_read_is_refused(dtype, num_bytes):
    """Valid safetensors, whose reader for torch raises KeyError; older ones do not know the dtype at all."""
    entry = {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, num_bytes]}
    header = json.dumps({"weight": entry}).encode()
    with pytest.raises(CacheCorruptError, match=f"tensors were expected, found '{dtype}'|not a safetensors file"):
        OutputHead.from_bytes(len(header).to_bytes(8, "little") + header + bytes(num_bytes))


def test_bytes_that_are_no_safetensors_file_are_refused():
    whole = OutputHead(torch.ones(4, 2)).to_bytes()
    for data in (b"", b"x" * 100, whole[:-1], whole[:20], pickle.dumps({"weight": 1})):
        with pytest.raises(CacheCorruptError, match="not a safetensors file"):
            OutputHead.from_bytes(data)


def test_the_first_rows_of_a_head_give_the_first_logits():
    torch.manual_seed(0)
    head = OutputHead(torch.randn(40, 8), torch.randn(40), 0.5, 20.0)
    hidden = torch.randn(5, 8)
    torch.testing.assert_close(head.first(33).logits(hidden), head.logits(hidden)[:, :33])
