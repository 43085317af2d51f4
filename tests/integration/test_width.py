"""Students cut out of a teacher in width, against what must be true of them exactly."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdcache.cli import main
from kdcache.errors import ConfigError
from kdcache.train.options import InitOptions
from kdcache.train.student import init_student
from kdcache.train.width import keep_heads
from tests.conftest import VOCAB_SIZE, make_tokenizer, validates_configs

IDS = torch.arange(40)[None] * 7 % VOCAB_SIZE
SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.15, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True,
    "rms_norm_eps": 1e-9,  # added to a mean over fewer channels, so not quite the same share of it
}  # fmt: skip
SAME = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def make(folder, change=None, family="llama", **shape):
    """A random teacher whose norms and biases are not all one and zero, changed in place before it is saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SHAPE | shape)), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "norm" in name else -0.5))
        if change:
            change(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def cut(teacher, folder, **options):
    about = init_student(
        InitOptions.model_validate({"from": teacher, "output": str(folder), "calibration_tokens": 1024} | options)
    )
    assert json.loads((folder / "kdcache_init.json").read_text()) == about
    return load(folder)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_pruning_nothing_changes_nothing(tmp_path, family, tied):
    teacher = make(tmp_path / "t", family=family, tie_word_embeddings=tied)
    student = cut(teacher, tmp_path / "s", **SAME)
    for name, value in load(teacher).state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name
    assert torch.equal(logits(student), logits(load(teacher)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_dead_is_cut_and_logits_stay(tmp_path, family, tied):
    """Channels, neurons and a whole group of heads that say nothing, other ones in every layer: they are what is left out."""
    channels = torch.tensor([0, 5, 6, 13, 17, 22, 30, 31])

    def kill(model):
        trunk = model.model
        trunk.embed_tokens.weight[:, channels] = 0
        for index, layer in enumerate(trunk.layers):
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[channels] = 0
            layer.mlp.up_proj.weight[index : index + 9] = 0
            group = index % 2
            layer.self_attn.v_proj.weight[8 * group : 8 * group + 8] = 0
            if layer.self_attn.v_proj.bias is not None:
                layer.self_attn.v_proj.bias[8 * group : 8 * group + 8] = 0

    teacher = load(make(tmp_path / "t", kill, family, tie_word_embeddings=tied))
    student = cut(str(tmp_path / "t"), tmp_path / "s", hidden_size=24, intermediate_size=39, num_attention_heads=2)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    alive = [c for c in range(32) if c not in channels]
    assert torch.equal(student.model.embed_tokens.weight, teacher.model.embed_tokens.weight[:, alive])
    for index, (ours, theirs) in enumerate(zip(student.model.layers, teacher.model.layers, strict=True)):
        neurons = [n for n in range(48) if not index <= n < index + 9]
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight[neurons][:, alive])
        rows = slice(8, 16) if index % 2 == 0 else slice(0, 8)
        assert torch.equal(ours.self_attn.k_proj.weight, theirs.self_attn.k_proj.weight[rows][:, alive])
    config = student.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        24,
        2,
        1,
        8,
    )


def test_kept_query_heads_use_their_own_key_value_head(tmp_path):
    """Three groups of four; each keeps its two loudest heads. By hand: the teacher with the others silenced before o_proj."""
    shape = {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48}
    dead = [[0, 3, 4, 5, 9, 10], [1, 2, 6, 7, 8, 11], [0, 1, 5, 6, 10, 11]]

    def quiet(model):
        for layer, heads in zip(model.model.layers, dead, strict=True):
            for head in heads:
                layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0

    teacher = load(make(tmp_path / "t", quiet, **shape))
    scores = torch.ones(12)
    scores[dead[0]] = 0
    queries, groups = keep_heads(scores, 3, 6, 3)
    assert queries.tolist() == [1, 2, 6, 7, 8, 11]
    assert groups.tolist() == [0, 1, 2]
    assert keep_heads(scores + torch.tensor([0] * 4 + [9] * 4 + [0] * 4), 3, 2, 1)[0].tolist() == [6, 7]

    # Importance sees heads before o_proj, so here the test says which ones are loud.
    from kdcache.train import width

    real = width.measure_importance

    def loud(*arguments):
        found = real(*arguments)
        for scores, heads in zip(found.heads, dead, strict=True):
            scores[heads] = 0
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(width, "measure_importance", loud)
        student = cut(str(tmp_path / "t"), tmp_path / "s", num_attention_heads=6, num_key_value_heads=3)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)


def test_tied_embeddings_stay_tied(tmp_path):
    make(tmp_path / "t")
    student = cut(str(tmp_path / "t"), tmp_path / "s", hidden_size=16)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    held = load_file(tmp_path / "s" / "model.safetensors")
    assert [name for name, value in held.items() if value.shape[0] == VOCAB_SIZE] == ["model.embed_tokens.weight"]
    assert sum(value.numel() for value in held.values()) == sum(p.numel() for p in student.parameters())
    assert student.generation_config.eos_token_id == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "s")) == VOCAB_SIZE


def test_depth_and_width_together(tmp_path):
    """As cutting layers first, and the width of what is left then."""
    teacher = make(tmp_path / "t", family="qwen2")
    both = cut(teacher, tmp_path / "both", layers=2, hidden_size=24, intermediate_size=20)
    cut(teacher, tmp_path / "deep", layers=2)
    after = cut(str(tmp_path / "deep"), tmp_path / "after", hidden_size=24, intermediate_size=20)
    assert both.config.num_hidden_layers == len(both.config.layer_types) == 2
    assert torch.equal(logits(both), logits(after))


BAD = [
    ({"hidden_size": 64}, "--hidden-size 64: the teacher has 32", "not larger"),
    ({"intermediate_size": 49}, "--intermediate-size 49: the teacher has 48", "not larger"),
    ({"num_attention_heads": 3}, "2 query heads for each", "multiple of 2"),
    ({"num_attention_heads": 3, "num_key_value_heads": 2}, "equal groups", "multiple of 2"),
    ({"num_attention_heads": 4, "num_key_value_heads": 1}, "at most 2", "multiple of 2"),
    pytest.param(
        {"hidden_size": 25}, "no such llama model", "multiple of num_attention_heads", marks=validates_configs
    ),
    ({"hidden_size": 24, "shape": {"hidden_size": 24}}, "--layers and --shape", "random weights"),
]


@pytest.mark.parametrize(("options", "message", "hint"), BAD)
def test_bad_widths_are_one_clear_error(tmp_path, options, message, hint):
    teacher = make(tmp_path / "t")
    with pytest.raises(ConfigError, match=message) as caught:
        cut(teacher, tmp_path / "s", **options)
    assert hint in caught.value.hint
    assert not (tmp_path / "s").exists()


def test_a_family_that_is_not_known_is_refused(tmp_path):
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB_SIZE}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape)).save_pretrained(tmp_path / "t")
    make_tokenizer().save_pretrained(tmp_path / "t")
    with pytest.raises(ConfigError, match="a gpt2 model cannot be cut in width") as caught:
        cut(str(tmp_path / "t"), tmp_path / "s", hidden_size=16)
    assert "--layers" in caught.value.hint


def test_the_command_says_how_to_heal(tmp_path, capsys):
    teacher = make(tmp_path / "t")
    arguments = ["init-student", "--from", teacher, "--output", str(tmp_path / "s"), "--num-attention-heads", "2"]
    main([*arguments, "--calibration-tokens", "64"], standalone_mode=False)
    out = capsys.readouterr().out
    assert "num_key_value_heads 1" in out
    assert f"kdcache train-student --student {tmp_path / 's'}" in out
