"""Where a model is found, its two parts, packing, its tokenizer's description."""

import json
import os
import shutil

import pytest
import torch
import transformers

from kdcache import models
from kdcache.errors import ConfigError, ModelError
from kdcache.model_files import find_model, find_named_model, model_digest
from kdcache.models import (
    describe_model,
    describe_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
    parse_dtype,
    pick_device,
)
from tests.conftest import VOCAB_SIZE, make_llama, make_tokenizer
from tests.unit.test_heads import build


@pytest.mark.parametrize(
    ("has", "dtype", "says"), [(False, "bfloat16", 1), (True, "bfloat16", 0), (False, "float32", 0)]
)
def test_a_cpu_without_bfloat16_is_told_of_once(tiny_teacher, monkeypatch, caplog, has, dtype, says):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: has, raising=False)
    monkeypatch.setattr(models.platform, "machine", lambda: "x86_64")
    models._warn_about_bfloat16.cache_clear()
    for _ in range(2):
        load_model(find_model(tiny_teacher), dtype=getattr(torch, dtype))
    assert caplog.text.count("float32 is two to three times as fast here") == says


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


@pytest.mark.parametrize("name", ["package:innocent.model", "package:innocent", "package:..innocent", "package:"])
def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch, name):
    """Its name may stand in a stranger's file: neither it nor what its name begins with is run."""
    (tmp_path / "innocent" / "model").mkdir(parents=True)
    for folder in ("innocent", "innocent/model"):
        (tmp_path / folder / "__init__.py").write_text("raise SystemExit('was run')")
        (tmp_path / folder / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    if name == "package:innocent":
        assert find_model(name).folder_or_name == str(tmp_path / "innocent")
    else:
        with pytest.raises(ModelError, match="is not installed"):
            find_model(name)


def test_the_working_directory_holds_no_packages(tmp_path, monkeypatch):
    (tmp_path / "lying_about").mkdir()
    (tmp_path / "lying_about" / "m.gguf").write_bytes(b"GGUF")
    for entry in ("", ".", str(tmp_path)):
        monkeypatch.syspath_prepend(entry)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="is not installed"):
        find_model("package:lying_about")


def test_of_a_model_that_only_a_file_names_data_on_this_machine_are_read(tmp_path, tiny_teacher, monkeypatch):
    source = find_named_model(tiny_teacher)
    assert model_digest(source) == model_digest(find_model(tiny_teacher))
    load_tokenizer(source)
    load_model(source, dtype=torch.float32)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_teacher, pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(find_named_model(str(pickled)), dtype=torch.float32)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": tiny_teacher}))
    assert find_model(str(adapter)).adapter
    with pytest.raises(ModelError, match="is an adapter"):
        find_named_model(str(adapter))


def test_of_a_model_that_only_a_file_names_nothing_is_fetched(monkeypatch):
    import huggingface_hub

    real, asked = huggingface_hub.hf_hub_download, []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **more: asked.append(more) or real(*a, **more))
    source = find_named_model("nobody/has-this-model")
    with pytest.raises(ModelError):
        model_digest(source)
    assert asked[0]["local_files_only"] and source.load_arguments == {"local_files_only": True}


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


# --- loading ----------------------------------------------------------------------------------------------------------


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
    assert pick_device("cpu") == "cpu"
    for absent in ("cuda:77", "tpu", ""):
        with pytest.raises(ConfigError, match=f"device {absent}: ") as caught:
            pick_device(absent)
        assert caught.value.hint
    assert pick_device() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_nothing_here_reaches_the_network():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
