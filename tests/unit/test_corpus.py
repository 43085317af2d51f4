"""Rows of every format and kind -> token ids with a loss mask; what cannot be read is named."""

import csv
import gzip
import json

import numpy as np
import pytest

from kdcache.corpus import CorpusCounts, make_sequences, mean_row_tokens, tokenize_row
from kdcache.errors import CorpusError
from kdcache.rows import BUILTIN, detect_columns, load_rows, source_digest
from kdcache.specs import CorpusSpec
from tests.conftest import make_tokenizer

ROWS = [{"text": "the cat sat"}, {"text": "a dog, Zürich"}, {"text": "green\ngrass"}]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def spec(columns="text", **changes):
    given = {"dataset": "d", "digest": "0" * 32, "split": "train", "num_rows": 3, "text_column": "text", "seq_len": 64,
             "packing": False, "append_eos": True, "assistant_only": True}  # fmt: skip
    return CorpusSpec(columns=columns, **(given | changes))


# --- formats ----------------------------------------------------------------------------------------------------------


def write_rows(folder, kind, rows=ROWS):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "jsonl.zst":
        import zstandard

        path.write_bytes(zstandard.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with open(path, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "saved":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "saved_splits":
        import datasets

        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(path)
    return str(path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 3 leaves a csv file open
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet", "saved", "saved_splits"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    assert list(load_rows(write_rows(tmp_path, kind), "train")) == ROWS


def test_txt_is_a_row_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    assert [row["text"] for row in load_rows(str(path), "train")] == ["one", "two"]


def test_a_folder_and_a_glob_are_read_in_the_order_of_names(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    for dataset in (str(tmp_path), str(tmp_path / "*.jsonl")):
        assert [row["text"] for row in load_rows(dataset, "train")] == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["jsonl", "saved", "saved_splits"])
def test_splits_take_slices(tmp_path, kind):
    rows = [{"text": str(i)} for i in range(10)]
    path = write_rows(tmp_path, kind, rows)
    assert [row["text"] for row in load_rows(path, "train[:30%]")] == ["0", "1", "2"]
    assert [row["text"] for row in load_rows(path, "train[8:]")] == ["8", "9"]
    assert [row["text"] for row in load_rows(path, "train[2:4]+train[7:8]")] == ["2", "3", "7"]


def test_the_builtin_corpus_is_real_text():
    rows = load_rows(BUILTIN, "train")
    assert sum(len(row["text"]) for row in rows) > 300_000
    assert len(load_rows(BUILTIN, "train[:10]")) == 10


def test_the_digest_follows_the_content(tmp_path):
    path = write_rows(tmp_path, "jsonl")
    before = source_digest(path, "train")
    assert source_digest(path, "train") == before
    write_rows(tmp_path, "jsonl", [*ROWS[:2], {"text": "green grasS"}])
    assert source_digest(path, "train") != before
    (tmp_path / "elsewhere").mkdir()
    moved = write_rows(tmp_path / "elsewhere", "jsonl")
    assert source_digest(moved, "train") == before, "where the file lies is no matter"
    saved = write_rows(tmp_path, "saved")
    assert source_digest(saved, "train") == source_digest(saved, "train")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none.jsonl", "no such file or folder"),
        (lambda d: write(d / "a.jsonl", '{"text": "ok"}\n{"text": '), "cannot be read"),
        (lambda d: write(d / "a.parquet", "this is not parquet"), "cannot be read"),
        (lambda d: write(d / "a.jsonl", ""), "no rows"),
        (lambda d: write(d / "sub" / "a.xyz", "x").parent, "no files of a known kind"),
        (lambda d: write(d / "a.xyz", "x"), "files of one known kind"),
        (lambda d: (write(d / "m" / "a.csv", "text\nx\n"), write(d / "m" / "b.txt", "x"))[0].parent, "one known kind"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, message):
    dataset = str(make(tmp_path))
    with pytest.raises(CorpusError, match=message) as caught:
        load_rows(dataset, "train")
    assert dataset in caught.value.message


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_an_empty_split_and_an_unknown_one(tmp_path):
    with pytest.raises(CorpusError, match="no data"):
        load_rows(write_rows(tmp_path, "jsonl"), "train[:0]")
    with pytest.raises(CorpusError, match=r"split 'test' was asked for, the dataset has \['train'\]"):
        load_rows(write_rows(tmp_path, "saved_splits"), "test")


def test_a_hub_name_without_a_network_is_one_clear_error():
    with pytest.raises(CorpusError, match=r"dataset no-such/name: cannot be read"):
        load_rows("no-such/name", "train")


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "asked", "found"),
    [
        (["text", "id"], None, ("text", "text")),
        (["body"], "body", ("text", "body")),
        (["prompt", "completion"], None, ("prompt_completion", "completion")),
        (["messages", "text"], None, ("messages", "messages")),
        (["prompt", "completion", "text"], None, ("prompt_completion", "completion")),
    ],
)
def test_columns_are_told_apart_by_name(names, asked, found):
    assert detect_columns(names, asked) == found


def test_unknown_columns_are_listed():
    with pytest.raises(CorpusError, match=r"found \['content', 'id'\]") as caught:
        detect_columns(["id", "content"])
    assert "--text-column" in caught.value.hint
    with pytest.raises(CorpusError, match="'body' was asked for"):
        detect_columns(["text"], "body")


# --- loss masks -------------------------------------------------------------------------------------------------------


def learned(document, tokenizer):
    """The text of the tokens that are learned."""
    return tokenizer.decode(document.input_ids[document.loss_mask])


def test_off_by_one_mask(tokenizer):
    """Of a text all tokens are learned but the first, which nothing precedes; the end of sequence is one of them."""
    document = tokenize_row({"text": "the cat sat"}, spec(), tokenizer)
    ids = tokenizer("the cat sat")["input_ids"]
    assert document.input_ids.tolist() == [*ids, tokenizer.eos_token_id]
    assert document.loss_mask.tolist() == [False] + [True] * len(ids)
    without = tokenize_row({"text": "the cat sat"}, spec(append_eos=False), tokenizer)
    assert without.input_ids.tolist() == ids


def test_an_end_that_is_there_is_not_doubled(tokenizer):
    document = tokenize_row({"text": "the cat<|endoftext|>"}, spec(), tokenizer)
    assert document.input_ids.tolist().count(tokenizer.eos_token_id) == 1


def test_of_a_completion_the_prompt_is_not_learned(tokenizer):
    row = {"prompt": "the cat sat on", "completion": " a green mat."}
    document = tokenize_row(row, spec("prompt_completion"), tokenizer)
    assert tokenizer.decode(document.input_ids) == row["prompt"] + row["completion"] + tokenizer.eos_token
    assert learned(document, tokenizer) == row["completion"] + tokenizer.eos_token
    everything = tokenize_row(row, spec("prompt_completion", assistant_only=False), tokenizer)
    assert everything.loss_mask[1:].all()


def test_a_token_across_the_border_is_learned(tokenizer):
    """Prompt and completion are tokenized together, as the model will see them; a token of both holds some completion."""
    document = tokenize_row({"prompt": "on t", "completion": "he mat"}, spec("prompt_completion"), tokenizer)
    joined = tokenizer("on the mat")["input_ids"]
    assert document.input_ids.tolist()[:-1] == joined
    assert "the" in learned(document, tokenizer)


CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on a mat."},
    {"role": "user", "content": "and the dog"},
    {"role": "assistant", "content": "saw the rain."},
]


def test_of_a_chat_what_the_assistant_says_is_learned(tokenizer):
    document = tokenize_row({"messages": CHAT}, spec("messages"), tokenizer)
    assert tokenizer.decode(document.input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learned(document, tokenizer) == "sat on a mat.<|im_end|>saw the rain.<|im_end|>"
    whole = tokenize_row({"messages": CHAT}, spec("messages", assistant_only=False), tokenizer)
    assert whole.loss_mask[1:].all()


def test_of_a_chat_completion_only_the_completion_is_learned(tokenizer):
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    document = tokenize_row(row, spec("prompt_completion"), tokenizer)
    assert learned(document, tokenizer) == "saw the rain.<|im_end|>"


def test_a_chat_without_assistant_or_without_text_has_nothing_to_learn(tokenizer):
    assert tokenize_row({"messages": CHAT[:1]}, spec("messages"), tokenizer) is None
    assert tokenize_row({"messages": []}, spec("messages"), tokenizer) is None
    assert tokenize_row({"text": ""}, spec(), tokenizer) is None
    assert tokenize_row({"text": None}, spec(), tokenizer) is None
    assert tokenize_row({"prompt": "the cat", "completion": ""}, spec("prompt_completion"), tokenizer) is None


def test_chats_need_a_template_that_keeps_earlier_turns():
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(CorpusError, match="no chat template"):
        tokenize_row({"messages": CHAT}, spec("messages"), bare)
    rewriting = make_tokenizer()
    rewriting.chat_template = "{{ messages|length }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    with pytest.raises(CorpusError, match="rewrites earlier turns") as caught:
        tokenize_row({"messages": CHAT}, spec("messages"), rewriting)
    assert "--no-assistant-only" in caught.value.hint
    assert tokenize_row({"messages": CHAT}, spec("messages", assistant_only=False), rewriting) is not None
    refusing = make_tokenizer()
    refusing.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CorpusError, match="roles must alternate"):
        tokenize_row({"messages": CHAT}, spec("messages"), refusing)


def test_a_column_of_another_type_is_named(tokenizer):
    with pytest.raises(CorpusError, match="column 'text': str was expected, found int: '3'"):
        tokenize_row({"text": 3}, spec(), tokenizer)
    with pytest.raises(CorpusError, match="column 'messages': list was expected, found str"):
        tokenize_row({"messages": "hello"}, spec("messages"), tokenizer)


# --- sequences --------------------------------------------------------------------------------------------------------


def test_long_text_goes_on_in_the_next_sequence(tokenizer):
    text = " ".join(["the cat sat on a mat"] * 20)
    counts = CorpusCounts()
    pieces = make_sequences([{"text": text}], spec(seq_len=16), tokenizer, counts)
    assert counts.num_split == 1
    assert all(len(piece) <= 16 and not piece.loss_mask[0] for piece in pieces)
    together = np.concatenate([piece.input_ids for piece in pieces]).tolist()
    assert together == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][: len(together)]


def test_a_long_chat_is_truncated_and_counted(tokenizer):
    counts = CorpusCounts()
    rows = [{"messages": CHAT}, {"messages": [{"role": "user", "content": "rain " * 50}, CHAT[1]]}]
    sequences = make_sequences(rows, spec("messages", seq_len=32), tokenizer, counts)
    assert (counts.num_rows, counts.num_truncated, counts.num_skipped) == (2, 2, 1)
    assert [len(sequence) for sequence in sequences] == [32]


def test_sequences_are_a_function_of_their_rows(tokenizer):
    rows = [{"text": text["text"] * 3} for text in ROWS]
    one, two = (make_sequences(rows, spec(packing=True), tokenizer) for _ in range(2))
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(one, two, strict=True))


def test_the_pilot_counts_tokens_of_a_row(tmp_path, tokenizer):
    rows = load_rows(write_rows(tmp_path, "jsonl"), "train")
    expected = np.mean([len(tokenizer(row["text"])["input_ids"]) + 1 for row in ROWS])
    assert mean_row_tokens(rows, spec(), tokenizer) == pytest.approx(expected)
