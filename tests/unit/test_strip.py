"""Text token by token: the parts of every kind of tokenizer joined are the whole."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdcache.evaluate.strip import CONTEXT, TextSoFar
from tests.conftest import make_tokenizer

TEXT = "the cat sat on Zürich, 東京 🙂 and the mat, 東京 🙂 the cat"


def unigram():
    """As T5 and newer SentencePiece models have it: Metaspace, with bytes for what is not in the vocabulary."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁the",
        "▁cat",
        "▁sat",
        "▁on",
        "▁and",
        "▁mat",
        "▁",
        ",",
        *"thecasondmrZri",
    ]
    vocabulary = [(piece, -1.0 if len(piece) < 3 or piece[0] == "▁" else -9.0) for piece in dict.fromkeys(pieces)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def llama():
    """As Llama 2 and Mistral have it: BPE over text whose spaces are marked, and a decoder that drops the first one."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", ",", *"thecasondmrZi"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("make", [unigram, llama, make_tokenizer])
@pytest.mark.parametrize("given", [1, 2, 9, 22])
def test_the_parts_are_the_whole(make, given):
    """Characters of several bytes are cut into several tokens, wherever the text before ends, and longer than what is decoded again."""
    tokenizer = make()
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT and len(ids) > CONTEXT + given
    text = TextSoFar(tokenizer, ids[:given])
    parts = [text.before]
    for token in ids[given:]:
        shown, added = text.shown(token), text.add(token)
        assert "\ufffd" not in shown and shown and (shown == added or not added)
        parts.append(added)
    assert "".join(parts) == TEXT and "\ufffd" not in "".join(parts)
    assert {" the", "東", "🙂"} <= {*parts} or make is make_tokenizer


@pytest.mark.parametrize("make", [unigram, llama])
def test_another_token_than_the_next_is_read_after_the_same_text(make):
    tokenizer = make()
    ids = tokenizer("the cat")["input_ids"]
    text = TextSoFar(tokenizer, ids[:1])
    the, first_byte = tokenizer.convert_tokens_to_ids(["▁the", "<0xE6>"])
    assert [text.shown(token) for token in (the, first_byte, ids[1])] == [" the", "<0xE6>", " cat"]
    text.add(first_byte)
    assert text.shown(the) == " the"


def test_bytes_that_are_no_character_are_shown_as_such():
    tokenizer = unigram()
    the, byte, cat = tokenizer.convert_tokens_to_ids(["▁the", "<0xE6>", "▁cat"])
    text = TextSoFar(tokenizer, [the])
    assert [text.add(byte), text.add(cat)] == ["", "\ufffd cat"]
