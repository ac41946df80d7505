import json
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
from jinja2 import TemplateError
from tokenizers import normalizers
from transformers import AutoTokenizer, LEDTokenizer, PreTrainedTokenizerFast

from data_pipeline.errors import DataError
from data_pipeline.tokens.encoding import DocumentEncoder
from data_pipeline.tokens.tokenization import decode_answer, encode_prompt, fingerprint
from data_pipeline.tokens.tokenizer import CHAT_TEMPLATE, SEP_TOKEN, CorpusTokenizer, load_tokenizer, train_tokenizer

TEXTS = ["What is 12 + 345?", "It's 357, isn't it", " double  spaces\n\nlines ", "π ≈ 3.14 é 漢字 🙂", "x < y </s>", ""]
SPECIAL = "a <s> b</s><mask> <pad><unk> <sep>c"


def encode_documents(tokenizer, questions, answers):
    """Encodes as `prepare` does: ids and answer start of each pair."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        ids, lengths, starts = DocumentEncoder(folder, fast=False).encode(
            pl.Series(questions, dtype=pl.String), pl.Series(answers, dtype=pl.String)
        )
    return list(zip(np.split(ids, np.cumsum(lengths)[:-1]), starts.tolist(), strict=True))


def train(**options) -> CorpusTokenizer:
    return train_tokenizer(iter(TEXTS * 5), vocab_size=300, **options)


@pytest.fixture(scope="module", params=["trained", "LED"])
def made(request) -> CorpusTokenizer:
    return train() if request.param == "trained" else load_tokenizer(request.getfixturevalue("led_tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(made, tmp_path_factory):
    """What transformers loads from the folder that it was saved to."""
    return loaded(made, tmp_path_factory.mktemp("tokenizer"))


def loaded(made: CorpusTokenizer, folder):
    made.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_document_is_question_and_answer_between_special_tokens(tokenizer):
    (ids, answer_start), (_, other_start) = encode_documents(tokenizer, ["2 + 2?", ""], ["4", "x"])
    assert ids[0] == tokenizer.bos_token_id
    assert ids[answer_start - 1] == tokenizer.convert_tokens_to_ids("<sep>")
    assert ids[-1] == tokenizer.eos_token_id
    assert sum(ids == tokenizer.sep_token_id) == 1
    assert other_start == 2
    assert encode_prompt(tokenizer, "2 + 2?") == ids[:answer_start].tolist()


def test_every_text_comes_back_exactly(tokenizer):
    for text in [*TEXTS, SPECIAL]:
        ((ids, answer_start),) = encode_documents(tokenizer, [text], [text])
        assert decode_answer(tokenizer, ids[answer_start:].tolist()) == text
        assert decode_answer(tokenizer, ids[1 : answer_start - 1]) == text


def test_literal_special_tokens_stay_text(tokenizer):
    ((ids, _),) = encode_documents(tokenizer, [SPECIAL], [SPECIAL])
    specials = [token for token in ids.tolist() if token in tokenizer.all_special_ids]
    assert specials == [tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id]
    # and only there: elsewhere the tokenizer recognises them as before
    assert tokenizer.backend_tokenizer.encode("</s>", add_special_tokens=False).ids == [tokenizer.eos_token_id]


def test_an_answer_ends_at_the_first_end_token(tokenizer):
    ((ids, answer_start),) = encode_documents(tokenizer, ["q"], ["yes"])
    assert decode_answer(tokenizer, [*ids[answer_start:].tolist(), *ids.tolist()]) == "yes"


def test_earlier_truncation_and_padding_leave_documents_whole(tokenizer):
    expected = encode_documents(tokenizer, TEXTS, TEXTS)
    identity = fingerprint(tokenizer.backend_tokenizer)
    tokenizer(TEXTS, truncation=True, max_length=3, padding="max_length")
    again = encode_documents(tokenizer, TEXTS, TEXTS)
    assert [(ids.tolist(), start) for ids, start in again] == [(ids.tolist(), start) for ids, start in expected]
    assert fingerprint(tokenizer.backend_tokenizer) == identity


def test_a_saved_tokenizer_comes_back_whole_by_any_loader(made, tokenizer, tmp_path):
    conversation = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    ((document, _),) = encode_documents(tokenizer, ["why?"], ["so"])
    made.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).fingerprint == made.fingerprint == fingerprint(tokenizer.backend_tokenizer)
    assert len(tokenizer) == made.backend.get_vocab_size()
    assert tokenizer("why?").input_ids == document.tolist()[: len(tokenizer("why?").input_ids)]
    assert tokenizer.padding_side == "left"
    assert tokenizer.apply_chat_template(conversation)["input_ids"] == document.tolist()
    prompt = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True)["input_ids"]
    assert prompt == encode_prompt(tokenizer, "why?")


def test_the_chat_template_takes_systems_texts_parts_and_marks_what_an_assistant_wrote(tokenizer):
    def said(role: str, *parts: str) -> dict:
        return {"role": role, "content": [{"type": "text", "text": part} for part in parts]}

    turns = [
        said("system", "Be", " kind."),
        said("user", "why?"),
        said("assistant", "so"),
        said("user", "oh?"),
        said("assistant", "yes"),
    ]
    rendered = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
    documents = encode_documents(tokenizer, ["Be kind.\n\nwhy?", "oh?"], ["so", "yes"])
    assert rendered["input_ids"] == [number for ids, _ in documents for number in ids.tolist()]
    assert rendered["assistant_masks"] == [int(place >= start) for ids, start in documents for place in range(len(ids))]
    for wrong, message in (
        ([said("user", "a"), said("system", "b")], "system for the first message"),
        ([{"role": "user", "content": [{"type": "image"}]}], "Only parts of the type text"),
    ):
        with pytest.raises(TemplateError, match=message):
            tokenizer.apply_chat_template(wrong)


def test_a_tokenizer_with_gaps_in_its_ids_is_refused(made, tmp_path):
    """A new token gets the number of tokens as its id, which another one has then."""
    made.save(tmp_path)
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] != SEP_TOKEN]
    last = max(described["model"]["vocab"], key=described["model"]["vocab"].get)
    described["model"]["vocab"][last] += 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"has [\d,]+ tokens, but ids up to [\d,]+: number them without gaps"):
        load_tokenizer(str(tmp_path))


def test_the_files_are_those_that_transformers_writes(made, tmp_path):
    same = PreTrainedTokenizerFast(tokenizer_object=made.backend, **made.special_tokens, padding_side="left",
                                   clean_up_tokenization_spaces=False)  # fmt: skip
    same.chat_template = CHAT_TEMPLATE
    same.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == made.files()


@pytest.mark.parametrize("named", ["TokenizersBackend", "LEDTokenizerFast", "by the model alone"])
def test_a_folder_with_tokenizer_json_is_read_as_transformers_reads_it(led_tokenizer, tmp_path, named):
    """LED's class makes its own parts around the vocabulary; the generic one takes everything from the file."""
    original = LEDTokenizer.from_pretrained(led_tokenizer)
    original.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    if named == "by the model alone":  # as a hub's folder may be: no class, no names of special tokens
        config = {"model_max_length": 16384}
        (tmp_path / "config.json").write_text('{"model_type": "led"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).fingerprint == load_tokenizer(led_tokenizer).fingerprint


def test_the_post_processor_adds_only_the_beginning(tokenizer):
    ids = tokenizer("why?").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids


def test_a_trained_tokenizer_has_led_shape(tmp_path):
    tokenizer = loaded(train(), tmp_path)
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert (tokenizer.mask_token_id, tokenizer.sep_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    assert len(tokenizer) <= 300


def test_training_is_deterministic():
    assert train().fingerprint == train().fingerprint


def test_digits_are_single_tokens_unless_told_otherwise():
    texts = ["1234 1234 1234"] * 20
    split = train_tokenizer(iter(texts), vocab_size=300)
    assert len(split.backend.encode("1234", add_special_tokens=False)) == 4
    joined = train_tokenizer(iter(texts), vocab_size=300, split_digits=False)
    assert len(joined.backend.encode("1234", add_special_tokens=False)) == 1


def test_the_led_vocabulary_keeps_its_ids(led_tokenizer, tmp_path):
    original, prepared = LEDTokenizer.from_pretrained(led_tokenizer), loaded(load_tokenizer(led_tokenizer), tmp_path)
    for text in TEXTS:
        assert prepared(text).input_ids == original(text).input_ids[:-1]
    assert prepared.sep_token_id == 50265


def test_what_is_no_usable_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="vocab_size 100 is too small"):
        train_tokenizer(iter(TEXTS), vocab_size=100)
    with pytest.raises(DataError, match="no tokenizer can be loaded from .* neither tokenizer.json nor vocab.json"):
        load_tokenizer(str(tmp_path))
    for content in ("{", "[]", '{"version": "1.0"}', '{"model": {"type": "Unigram"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match="no tokenizer can be loaded from"):
            load_tokenizer(str(tmp_path))
    lossy = train()
    lossy.backend.normalizer = normalizers.Lowercase()
    lossy.save(tmp_path)
    with pytest.raises(DataError, match="does not give text back"):
        load_tokenizer(str(tmp_path))
    nameless = {name: value for name, value in train().special_tokens.items() if name != "pad_token"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(nameless))
    with pytest.raises(DataError, match="has no pad_token"):
        load_tokenizer(str(tmp_path))
