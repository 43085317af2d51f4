"""Students that train adapters: only these move, the saved folder is the trained model, resume and checkpointing change nothing."""

import json
import logging

import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.errors import ConfigError, ModelError
from kdcache.evaluate.metrics import TeacherStates, evaluate_model
from kdcache.model_files import find_model, model_digest
from kdcache.models import load_model
from kdcache.train.options import TrainOptions
from kdcache.train.run import train
from tests.integration.test_train import losses, make_cache

pytest.importorskip("peft")
LORA = {"r": 4, "lora_alpha": 16}


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tiny_teacher, corpus_file):
    folder = tmp_path_factory.mktemp("caches")
    top = make_cache(folder / "top", tiny_teacher, corpus_file, top_k=16)
    return top, make_cache(folder / "hidden", tiny_teacher, corpus_file, targets="hidden")


def run(cache, student, output, **options):
    given = {
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "max_steps": 8,
        "logging_steps": 1, "lora": LORA, "training": {"optim": "adamw_torch", "dataloader_pin_memory": False},
    }  # fmt: skip
    return train(TrainOptions(cache=cache, student=str(student), output=str(output), **(given | options))).results


def test_only_adapters_move_and_the_folder_is_the_trained_student(tmp_path, caches, tiny_student):
    top, hidden = caches
    before = load_model(find_model(tiny_student), dtype=torch.float32)
    results = run(top, tiny_student, tmp_path / "out", eval_cache=hidden)
    assert results["num_trained_parameters"] < results["num_parameters"] / 5
    curve = losses(tmp_path / "out")
    assert curve[-1] < curve[0]
    assert not list((tmp_path / "out").glob("model*.safetensors")), "adapters alone are saved"
    assert "| adapters | LoRA on" in (tmp_path / "out" / "README.md").read_text()
    source = find_model(str(tmp_path / "out"))
    merged = load_model(source, dtype=torch.float32)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed
    assert all("proj" in name for name in changed), "linear layers, neither embeddings nor head"
    metrics = evaluate_model(str(tmp_path / "out"), TeacherStates(open_cache(hidden), "cpu"))
    assert metrics.forward_kl == pytest.approx(results["eval_forward_kl"], abs=1e-5)
    assert model_digest(source) != model_digest(find_model(tiny_student))


def test_transformers_loads_it_too(tmp_path, caches, tiny_student):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(caches[0], tiny_student, tmp_path / "out", max_steps=3)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ours = load_model(find_model(str(tmp_path / "out")), dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the cat sat on a mat", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"chunk_positions": 5}, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}],
)  # fmt: skip
def test_the_same_losses_however_they_are_computed(tmp_path, caches, tiny_student, options):
    run(caches[0], tiny_student, tmp_path / "plain")
    run(caches[0], tiny_student, tmp_path / "other", **options)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), abs=2e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_adapted_head_is_not_taken_for_a_bare_matrix(tmp_path, caches, tiny_student, caplog):
    """The head's own weight without its adapter would give other logits: the model's own are used, and said so."""
    with caplog.at_level(logging.WARNING):
        results = run(caches[0], tiny_student, tmp_path / "out", eval_cache=caches[1], lora=LORA | {"target_modules": ["lm_head", "q_proj"]})  # fmt: skip
    assert "output head is not understood" in caplog.text
    metrics = evaluate_model(str(tmp_path / "out"), TeacherStates(open_cache(caches[1]), "cpu"))
    assert metrics.forward_kl == pytest.approx(results["eval_forward_kl"], abs=1e-5)


def test_resume_is_exact(tmp_path, caches, tiny_student):
    whole = run(caches[0], tiny_student, tmp_path / "whole", save_steps=4, max_steps=8)
    run(caches[0], tiny_student, tmp_path / "cut", save_steps=4, max_steps=8)
    for left_over in ("train_results.json", "adapter_model.safetensors"):
        (tmp_path / "cut" / left_over).unlink()
    for file in (tmp_path / "cut" / "checkpoint-8").iterdir():
        file.unlink()
    resumed = run(caches[0], tiny_student, tmp_path / "cut", save_steps=4, max_steps=8)
    assert resumed["resumed"]
    assert not whole["resumed"]
    names = ("whole", "cut")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names)
    assert first == second


def test_an_adapter_is_trained_on(tmp_path, caches, tiny_student):
    """Two stages, then a round by itself: one adapter of the first base model, which is what training ended with."""
    top, hidden = caches
    results = run(top, tiny_student, tmp_path / "out", eval_cache=hidden, then=[{"max_steps": 4}])
    first, second = tmp_path / "out" / "stage-1", tmp_path / "out"
    begun = json.loads((first / "train_results.json").read_text())["eval_forward_kl"]
    assert results["eval_forward_kl"] < begun
    run(top, second, tmp_path / "next", eval_cache=hidden, max_steps=4)
    for folder in (first, second, tmp_path / "next"):
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_student
        trained = json.loads((folder / "train_results.json").read_text())
        metrics = evaluate_model(str(folder), TeacherStates(open_cache(hidden), "cpu"))
        assert metrics.forward_kl == pytest.approx(trained["eval_forward_kl"], abs=1e-5), (
            "what was saved is what was trained"
        )
    assert len({model_digest(find_model(str(folder))) for folder in (first, second, tmp_path / "next")}) == 3


def test_an_adapter_is_taken_up_where_it_was(tmp_path, caches, tiny_student):
    """Trained on with a rate that moves nothing, it comes out as it went in."""
    run(caches[0], tiny_student, tmp_path / "out", max_steps=3)
    run(caches[0], tmp_path / "out", tmp_path / "same", max_steps=1, learning_rate=1e-30)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "same"))
    assert first == second


def test_an_adapter_has_its_own_fields(tmp_path, caches, tiny_student):
    run(caches[0], tiny_student, tmp_path / "out", max_steps=2)
    with pytest.raises(ConfigError, match=r"is an adapter(.|\n)*r: the adapter has 4, --lora gives 8"):
        run(caches[0], tmp_path / "out", tmp_path / "other", max_steps=2, lora=LORA | {"r": 8})
    run(caches[0], tmp_path / "out", tmp_path / "whole", max_steps=2, lora={})
    assert list((tmp_path / "whole").glob("model*.safetensors")), "merged, and all of it trained"


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"r": 8}, r"stage 2: --lora: the adapter (.|\n)*r: that has 4, this one 8"), ({"rank": 4}, "stage 2: .*no such field")],
)  # fmt: skip
def test_adapters_of_all_stages_are_checked_before_the_first(tmp_path, caches, tiny_student, lora, message):
    with pytest.raises(ConfigError, match=message):
        run(caches[0], tiny_student, tmp_path / "out", then=[{"lora": lora}])
    assert not (tmp_path / "out").exists()
    same = {"lora_alpha": LORA["lora_alpha"], "r": LORA["r"], "bias": "none"}
    run(caches[0], tiny_student, tmp_path / "same", max_steps=1, then=[{"lora": same}, {"lora": {}}])


def test_a_chain_of_adapters_is_refused(tmp_path, caches, tiny_student):
    """It would be read as its last adapter on the first base model."""
    for name in ("first", "second"):
        run(caches[0], tiny_student, tmp_path / name, max_steps=2)
    file = tmp_path / "second" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "first")}))
    with pytest.raises(ModelError, match="first is an adapter too"):
        find_model(str(tmp_path / "second"))


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"rank": 4}, "no such field"), ({"r": 0}, "r=0"), ({"r": 4, "target_modules": ["nothing"]}, "nothing")],
)
def test_bad_adapters_are_named(tmp_path, caches, tiny_student, lora, message):
    with pytest.raises(ConfigError, match=message):
        run(caches[0], tiny_student, tmp_path / "out", lora=lora)


def test_an_adapter_without_its_base_is_named(tmp_path, caches, tiny_student):
    run(caches[0], tiny_student, tmp_path / "out", max_steps=2)
    file = tmp_path / "out" / "adapter_config.json"
    config = json.loads(file.read_text())
    for base, message in [
        (str(tmp_path / "gone"), "base model: .*gone"),
        (None, "base model was expected, found None"),
    ]:
        file.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(ModelError, match=message):
            find_model(str(tmp_path / "out"))
    file.write_text("{")
    with pytest.raises(ModelError, match="names no base model"):
        find_model(str(tmp_path / "out"))
