"""Students cut out of a teacher in depth: what a layer does may follow from its number, and must not change with it."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from kdcache.errors import ConfigError, ModelError
from kdcache.train.options import InitOptions
from kdcache.train.student import init_student
from tests.conftest import VOCAB_SIZE, make_tokenizer

IDS = torch.arange(40)[None] * 7 % VOCAB_SIZE
SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.15, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LISTS = {
    # Rotary embeddings in some layers, and in one without a short window.
    "smollm3": {"no_rope_layers": [1, 0, 1, 0, 1, 1], "use_sliding_window": True, "sliding_window": 5},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 5},
    "mellum": {"mlp_layer_types": ["dense", "sparse"] * 3, "layer_types": ["full_attention", "sliding_attention"] * 3, "sliding_window": 5,
               **MOE},
}  # fmt: skip


def make(folder, family, dead=(), **shape):
    """A random teacher; dead layers leave the residual stream as it is, so that they are what is cut."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SHAPE | shape)), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" not in name:
                parameter.uniform_(-0.5, 0.5)
        for index in dead:
            for name, parameter in model.model.layers[index].named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    parameter.zero_()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def cut(teacher, folder, **options):
    options = {"from": teacher, "output": str(folder), "calibration_tokens": 256} | options
    return init_student(InitOptions.model_validate(options))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def skipped(model, layers):
    """Logits with layers that hand on what they were given."""

    def hand_on(_, inputs, output):
        return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

    handles = [model.model.layers[index].register_forward_hook(hand_on) for index in layers]
    out = logits(model)
    for handle in handles:
        handle.remove()
    return out


@pytest.mark.parametrize("family", LISTS)
@pytest.mark.parametrize("dead", [(1,), (2, 3), (0, 1, 2)])
def test_what_is_kept_does_what_it_did(tmp_path, family, dead):
    """The student as it is loaded again, against the teacher without the layers in between."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"no {family} in this release of transformers")
    teacher = make(tmp_path / "t", family, dead, **LISTS[family])
    about = cut(teacher, tmp_path / "s", layers=6 - len(dead))
    assert about["layers"] == [index for index in range(6) if index not in dead]
    student = load(tmp_path / "s")
    expected = skipped(load(teacher), dead)
    assert not torch.equal(expected, logits(load(make(tmp_path / "alive", family, **LISTS[family]))))
    torch.testing.assert_close(logits(student), expected, rtol=1e-5, atol=1e-5)
    for name, items in LISTS[family].items():
        if isinstance(items, list):
            assert getattr(student.config, name) == [items[index] for index in about["layers"]], name


def test_a_list_of_token_ids_is_no_list_of_layers(tmp_path):
    """As long as the teacher has layers, by chance."""
    teacher = make(tmp_path / "t", "llama", eos_token_id=[0, 1, 2, 3, 4, 5])
    cut(teacher, tmp_path / "s", layers=4)
    assert load(tmp_path / "s").config.eos_token_id == [0, 1, 2, 3, 4, 5]


def test_layers_that_go_by_their_numbers_are_refused(tmp_path):
    """The first layer is dense and the others are not, by a list of numbers: without it, one of the others would become dense."""
    shape = {"mlp_only_layers": [0], "decoder_sparse_step": 1, **MOE}
    teacher = make(tmp_path / "t", "qwen3_moe", (0, 1), **shape)
    with pytest.raises(ModelError, match="layer 0 of the student would not be layer 2 of the teacher: mlp") as caught:
        cut(teacher, tmp_path / "s", layers=4)
    assert "--shape" in caught.value.hint
    assert not (tmp_path / "s").exists()
    kept = make(tmp_path / "k", "qwen3_moe", (2, 3), **shape)
    assert cut(kept, tmp_path / "s", layers=4)["layers"] == [0, 1, 4, 5], "here the numbers still say what is so"
    torch.testing.assert_close(logits(load(tmp_path / "s")), skipped(load(kept), (2, 3)), rtol=1e-5, atol=1e-5)


def test_random_weights_in_fewer_layers(tmp_path):
    teacher = make(tmp_path / "t", "smollm3", **LISTS["smollm3"])
    cut(teacher, tmp_path / "s", shape={"num_hidden_layers": 3})
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["no_rope_layers"] == [1, 0, 1]
    assert config["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    cut(teacher, tmp_path / "own", shape={"num_hidden_layers": 2, "no_rope_layers": [0, 0]})
    assert load(tmp_path / "own").config.no_rope_layers == [0, 0]


def test_a_teacher_with_a_short_context(tmp_path):
    """Learned positions end where its context does; the calibration text goes on in the next row."""
    make(tmp_path / "teacher", "opt", max_position_embeddings=64, ffn_dim=48, word_embed_proj_dim=32)
    options = {"from": str(tmp_path / "teacher"), "layers": 4, "output": str(tmp_path / "student")}
    init_student(InitOptions.model_validate(options))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 4


def test_a_calibration_text_that_is_empty(tmp_path):
    make(tmp_path / "teacher", "gemma2", **LISTS["gemma2"])
    (tmp_path / "none.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    options = {"from": str(tmp_path / "teacher"), "layers": 4, "output": str(tmp_path / "student")}
    with pytest.raises(ConfigError, match="some text was expected, found none in 1 rows"):
        init_student(InitOptions.model_validate(options | {"calibration": str(tmp_path / "none.jsonl")}))
