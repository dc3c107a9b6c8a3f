# SPDX-License-Identifier: Apache-2.0
"""Models and tokenizers that lose the tokens a corpus does not use, against what they were before."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertPreTrainedModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from hfkdq import QuantizationSpec
from hfkdq.pruning.vocabulary import prune_vocabulary
from hfkdq.pruning.vocabulary.rows import renumbered_fields
from hfkdq.pruning.vocabulary.tokenizers import Merges
from hfkdq.quantization.convert import prepare_qat_

NOUNS = [
    "river",
    "stone",
    "harbour",
    "lantern",
    "meadow",
    "winter",
    "orchestra",
    "engine",
    "violin",
    "mountain",
    "planet",
    "garden",
    "thunder",
    "biscuit",
]
VERBS = [
    "carries",
    "follows",
    "remembers",
    "builds",
    "paints",
    "crosses",
    "forgets",
    "lifts",
    "borrows",
    "whistles",
    "measures",
    "gathers",
]
PLACES = ["Köln", "Paris", "Łódź", "東京", "Montréal", "Oslo", "1987", "2026", "café-bar", "Mr.Smith's", "#42"]
TEXTS = [f"The {noun} {verb} the {place}, {place}!" for noun in NOUNS for verb in VERBS for place in PLACES]
CORPUS = [TEXTS[place] for place in (0, 3, 140, 141, 420, 805)] + ["A river, a river; 1987."]
WIDTH = 16
BODY = dict(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


def saved_tokenizer(folder, backend: Tokenizer, **config):
    """The tokenizer as someone would download it, of the class named in `config`."""
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def word_piece(folder, size=600, tokenizer_class="BertTokenizer"):
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special))
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"], special, strict=True))
    return saved_tokenizer(folder, backend, tokenizer_class=tokenizer_class, **names)


def byte_level(folder, special=("<|endoftext|>",), processor=None, **config):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # As the published ones, special tokens at the end.
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    backend.add_special_tokens(list(special))
    if processor is not None:
        backend.post_processor = processor(backend)
    return saved_tokenizer(folder, backend, **config)


def byte_fallback(folder):
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.train_from_iterator(
        [text for text in TEXTS if "東" not in text], trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    state = json.loads(backend.to_str())
    learned = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)[3:]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    state["model"]["vocab"] = {token: place for place, token in enumerate(tokens)}
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    return saved_tokenizer(
        folder, Tokenizer.from_str(json.dumps(state)), tokenizer_class="LlamaTokenizer", legacy=False, **names
    )


def unigram(folder):
    special = ["<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        [text for text in TEXTS if "東" not in text],
        trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>"),
    )
    sentinels = [f"<extra_id_{place}>" for place in range(3)]
    state = json.loads(backend.to_str())
    state["model"]["vocab"] += [[token, 0.0] for token in reversed(sentinels)]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens(sentinels)
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=sentinels)
    return saved_tokenizer(folder, backend, tokenizer_class="T5Tokenizer", extra_ids=3, **names)


def word_level(folder, special=("[PAD]", "[UNK]", "[CLS]", "[SEP]")):
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=list(special)))
    ends = [(token, special.index(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return saved_tokenizer(folder, backend, tokenizer_class="PreTrainedTokenizerFast", **names)


def bert(folder):
    tokenizer = word_piece(folder)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **BODY))
    torch.nn.init.normal_(model.cls.predictions.bias)
    return model, tokenizer, WIDTH + 1


def bert_of_words(folder):
    tokenizer = word_level(folder)
    model = BertForMaskedLM(
        BertConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, max_position_embeddings=64, **BODY)
    )
    biases = 1 if model.cls.predictions.bias is model.cls.predictions.decoder.bias else 2  # Transformers 5 ties fewer
    return model, tokenizer, 2 * WIDTH + biases


def gpt2(folder):
    tokenizer = byte_level(folder, tokenizer_class="GPT2Tokenizer")
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=WIDTH, n_layer=1, n_head=2, bos_token_id=end, eos_token_id=end
    )
    return GPT2LMHeadModel(config), tokenizer, WIDTH


def llama(folder):
    tokenizer = byte_fallback(folder)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=2, **BODY)), tokenizer, 2 * WIDTH


def t5(folder):
    tokenizer = unigram(folder)  # the table has more rows than the tokenizer has tokens, as the published ones have
    config = T5Config(
        vocab_size=len(tokenizer) + 9, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )  # fmt: skip
    return T5ForConditionalGeneration(config), tokenizer, WIDTH


def bart(folder):
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    tokenizer = byte_level(
        folder,
        special,
        lambda it: processors.RobertaProcessing(("</s>", it.token_to_id("</s>")), ("<s>", it.token_to_id("<s>"))),
        tokenizer_class="BartTokenizer",
    )
    start, pad, end = (tokenizer.convert_tokens_to_ids(token) for token in special[:3])
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        bos_token_id=start, pad_token_id=pad, eos_token_id=end, decoder_start_token_id=end, forced_eos_token_id=end,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    torch.nn.init.normal_(model.final_logits_bias)
    return model, tokenizer, WIDTH


FAMILIES = [bert, bert_of_words, gpt2, llama, t5, bart]


def logits_of(model, ids):
    with torch.no_grad():
        inputs = dict(decoder_input_ids=ids) if model.config.is_encoder_decoder else {}
        return model.eval()(input_ids=ids, **inputs).logits


class Pruned:
    """A model and its tokenizer before and after."""

    def __init__(self, make, folder, **kwargs):
        self.model, self.tokenizer, self.per_row = make(folder)
        self.old_model = copy.deepcopy(self.model).eval()
        self.old = AutoTokenizer.from_pretrained(folder)
        result = prune_vocabulary(self.model, self.tokenizer, CORPUS, **kwargs)
        assert result[0] is self.model
        assert result[1] is self.tokenizer
        self.new_ids = {self.old.get_vocab()[token]: id_ for token, id_ in self.tokenizer.get_vocab().items()}
        self.kept = torch.tensor(sorted(self.new_ids))


@pytest.fixture(params=FAMILIES, ids=lambda make: make.__name__)
def pruned(request, tmp_path):
    return Pruned(request.param, tmp_path / "tokenizer")


def test_texts_of_the_corpus_are_cut_as_before(pruned):
    assert len(pruned.tokenizer) < len(pruned.old)
    assert [pruned.new_ids[old] for old in pruned.kept.tolist()] == list(range(len(pruned.tokenizer)))
    for text, pair in zip(CORPUS, CORPUS[1:] + CORPUS[:1], strict=True):
        for inputs in ((text,), (text, pair)):
            old, new = pruned.old(*inputs), pruned.tokenizer(*inputs)
            assert new["input_ids"] == [pruned.new_ids[id_] for id_ in old["input_ids"]]
            assert new.tokens() == old.tokens()
            assert {**new, "input_ids": 0} == {**old, "input_ids": 0}
        assert pruned.tokenizer.decode(new["input_ids"]) == pruned.old.decode(old["input_ids"])
    assert pruned.tokenizer.special_tokens_map == pruned.old.special_tokens_map


def test_logits_of_kept_rows_are_what_they_were(pruned):
    for text in CORPUS:
        old = logits_of(pruned.old_model, torch.tensor([pruned.old(text)["input_ids"]]))[..., pruned.kept]
        new = logits_of(pruned.model, torch.tensor([pruned.tokenizer(text)["input_ids"]]))
        assert new.shape == old.shape
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6)


def test_the_parameters_fall_by_the_rows_that_go(pruned):
    rows = pruned.old_model.config.vocab_size - len(pruned.tokenizer)
    parts = [part for part in pruned.model.modules() if hasattr(part, "config")]  # the halves of T5 have copies
    assert {part.config.vocab_size for part in parts} == {len(pruned.tokenizer)}
    before, after = pruned.old_model.num_parameters(), pruned.model.num_parameters()
    assert before - after == rows * pruned.per_row > 0
    assert pruned.model.config.hfkdq["vocabulary"] == {
        "tokens_before": len(pruned.old), "tokens_after": len(pruned.tokenizer),
        "rows_before": pruned.old_model.config.vocab_size, "rows_after": len(pruned.tokenizer),
        "parameters_before": before, "parameters_after": after, "min_count": 1,
    }  # fmt: skip


def test_plain_loading_gives_both_back(pruned, tmp_path):
    for place in ("once", "twice"):
        model, tokenizer = pruned.model, pruned.tokenizer
        model.save_pretrained(tmp_path / place)
        tokenizer.save_pretrained(tmp_path / place)
        loaded, info = type(model).from_pretrained(tmp_path / place, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        again = AutoTokenizer.from_pretrained(tmp_path / place)
        assert type(again) is type(tokenizer)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.added_tokens_decoder == tokenizer.added_tokens_decoder
        for text in [*CORPUS, "Wholly 东 unseen whistles 🙂"]:
            ids = tokenizer(text)["input_ids"]
            assert again(text)["input_ids"] == ids
            assert again.decode(ids) == tokenizer.decode(ids)
        ids = torch.tensor([tokenizer(CORPUS[0])["input_ids"]])
        assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
        assert loaded.config.vocab_size == len(again)
        pruned.model, pruned.tokenizer = loaded, again
    for name in ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"):
        if (tmp_path / "once" / name).exists():
            assert (tmp_path / "once" / name).read_text() == (tmp_path / "twice" / name).read_text(), name
    words = tmp_path / "once" / "vocab.txt"  # Transformers 4 writes it beside tokenizer.json
    if words.exists():
        assert words.read_text().split("\n")[:-1] == sorted(again.get_vocab(), key=again.get_vocab().get)


def test_other_texts_are_cut_into_smaller_pieces(pruned):
    """Words over the characters of the corpus, of which many are new to it."""
    known = {character for text in CORPUS for character in text} - {" "}
    words = [word for text in TEXTS for word in text.strip("!").split() if set(word) <= known]
    assert len(set(words)) > 25
    for text in {*words, *(" ".join(words[place : place + 5]) for place in range(0, 200, 5))}:
        old, new = pruned.old(text).tokens(), pruned.tokenizer(text).tokens()
        if type(pruned.old.backend_tokenizer.model) is models.WordLevel:
            assert [one == two or two == "[UNK]" for one, two in zip(old, new, strict=True)]  # whole words only
            continue
        assert len(new) >= len(old)
        if pruned.old.unk_token_id not in pruned.old(text)["input_ids"]:
            assert pruned.tokenizer.unk_token_id not in pruned.tokenizer(text)["input_ids"]
        decoded = [it.decode(it(text)["input_ids"]) for it in (pruned.old, pruned.tokenizer)]
        assert decoded[0] == decoded[1]
    logits_of(pruned.model, torch.tensor([pruned.tokenizer("東京 🙂 Łódź ¿?")["input_ids"]]))


@pytest.mark.parametrize("make", [gpt2, bart, llama])
def test_bytes_keep_every_text_writable(make, tmp_path):
    pruned = Pruned(make, tmp_path / "tokenizer")
    text = "Zażółć 🙂 東京\t\x07 naïve"
    assert pruned.tokenizer.decode(pruned.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def ends(model):
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


def test_ties_stay_ties_and_rows_stay_in_order(pruned):
    table, head = ends(pruned.model)
    old_table, old_head = ends(pruned.old_model)
    assert (table is head) == (old_table is old_head)
    assert torch.equal(table, old_table[pruned.kept])
    assert torch.equal(head, old_head[pruned.kept])
    assert isinstance(table, torch.nn.Parameter)
    module = pruned.model.get_input_embeddings()
    assert module.num_embeddings == len(pruned.tokenizer) == table.shape[0]
    assert pruned.model.get_output_embeddings().out_features == len(pruned.tokenizer)
    padding = pruned.old_model.get_input_embeddings().padding_idx
    assert module.padding_idx == (None if padding is None else pruned.new_ids[padding])
    loss = pruned.model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])).loss
    loss.backward()
    assert table.grad is not None


def test_a_bias_that_two_modules_hold_stays_one(tmp_path):
    model = Pruned(bert, tmp_path / "tokenizer").model
    predictions = model.cls.predictions
    assert predictions.bias is predictions.decoder.bias


def test_dtype_and_training_of_rows_stay(tmp_path):
    model, tokenizer, _ = llama(tmp_path / "tokenizer")
    model.bfloat16()
    model.lm_head.weight.requires_grad_(False)
    prune_vocabulary(model, tokenizer, CORPUS)
    table, head = ends(model)
    assert (table.dtype, head.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (table.requires_grad, head.requires_grad) == (True, False)


def test_ids_in_configurations_follow(tmp_path):
    model, tokenizer, _ = bart(tmp_path / "tokenizer")
    old = tokenizer.get_vocab()
    rare, other = old["Ġwhistles"], old["Ġplanet"]
    model.generation_config.update(
        suppress_tokens=[rare, other], bad_words_ids=[[other, rare], [rare]], eos_token_id=[model.config.eos_token_id, rare],
        sequence_bias=[[[other], -1.0]],
    )  # fmt: skip
    prune_vocabulary(model, tokenizer, CORPUS)
    new = tokenizer.get_vocab()
    rare, other = new["Ġwhistles"], new["Ġplanet"]
    generation = model.generation_config
    assert generation.suppress_tokens == [rare, other]
    assert generation.bad_words_ids == [[other, rare], [rare]]
    assert generation.eos_token_id == [new["</s>"], rare]
    assert generation.sequence_bias == [[[other], -1.0]]
    for config in (model.config, model.model.encoder.config, model.model.decoder.config):
        assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (
            new["<s>"],
            new["<pad>"],
            new["</s>"],
        )
        assert config.decoder_start_token_id == new["</s>"]
        assert config.vocab_size == len(tokenizer)
    assert generation.decoder_start_token_id == new["</s>"]
    assert tokenizer.pad_token_id == new["<pad>"]
    assert model.model.encoder.embed_tokens.padding_idx == new["<pad>"]


def test_only_fields_of_ids_are_renumbered():
    fields = dict(
        pad_token_id=3, image_token_index=4, eos_token_id=[3, 5], bos_token_id=None, mask_token_id=-1, num_layers=3,
        lang_to_id={"<|en|>": 5}, forced_decoder_ids=[[3, 5], [4, None]], sequence_bias={(3, 4): 3.0}, max_length=5,
    )  # fmt: skip
    new = {3: 30, 4: 40, 5: 50}
    assert renumbered_fields(fields, lambda id_: new.get(id_, id_)) == dict(
        pad_token_id=30, image_token_index=40, eos_token_id=[30, 50], mask_token_id=-1, lang_to_id={"<|en|>": 50},
        forced_decoder_ids=[[3, 50], [4, None]], sequence_bias={(30, 40): 3.0},
    )  # fmt: skip


def test_generation_writes_what_it_wrote(tmp_path):
    """All logits but those of kept tokens are forbidden before, so that both can write the same."""
    pruned = Pruned(bart, tmp_path / "tokenizer")
    gone = sorted(set(range(len(pruned.old))) - set(pruned.new_ids))
    old = pruned.old_model.generate(
        **pruned.old(CORPUS[:3], return_tensors="pt", padding=True),
        max_new_tokens=8,
        suppress_tokens=gone,
        num_beams=2,
    )
    new = pruned.model.generate(**pruned.tokenizer(CORPUS[:3], return_tensors="pt", padding=True), max_new_tokens=8, num_beams=2)  # fmt: skip
    assert new.tolist() == [[pruned.new_ids[id_] for id_ in row] for row in old.tolist()]


def test_rows_that_a_configuration_names_without_a_token_come_last(tmp_path):
    model, tokenizer, _ = t5(tmp_path / "tokenizer")
    size = len(tokenizer)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = size + 4
    row = model.shared.weight[size + 4].clone()
    prune_vocabulary(model, tokenizer, CORPUS)
    assert model.config.vocab_size == len(tokenizer) + 1 < size
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == len(tokenizer)
    assert torch.equal(model.shared.weight[-1], row)


def test_positions_that_are_counted_from_padding_stay(tmp_path):
    special = ("[UNK]", "[CLS]", "[SEP]")
    tokenizer = word_level(tmp_path / "tokenizer", special=(*special, "one", "two", "[PAD]"))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] not in ("one", "two")]
    tokenizer.backend_tokenizer.save(str(tmp_path / "unused.json"))
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    config = RobertaConfig(vocab_size=len(tokenizer), pad_token_id=5, max_position_embeddings=64, **BODY)
    model = RobertaModel(config).eval()
    old = [
        model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state for text in CORPUS
    ]
    prune_vocabulary(model, tokenizer, CORPUS)
    assert len(tokenizer) < 30
    assert tokenizer.pad_token_id == model.config.pad_token_id == 5
    for text, states in zip(CORPUS, old, strict=True):
        new = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
        assert torch.equal(new, states)


def test_counts_decide_under_a_limit(tmp_path):
    corpus = ["river " * 5 + "stone " * 3 + "engine " * 2 + "Oslo"]
    sizes = {}
    for name, limits in {"all": {}, "twice": dict(min_count=2), "six": dict(max_size=6)}.items():
        tokenizer = word_level(tmp_path / name)
        model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **BODY))
        prune_vocabulary(model, tokenizer, corpus, **limits)
        sizes[name] = set(tokenizer.get_vocab()) - {"[PAD]", "[UNK]", "[CLS]", "[SEP]"}
    assert sizes == {
        "all": {"river", "stone", "engine", "Oslo"},
        "twice": {"river", "stone", "engine"},
        "six": {"river", "stone"},
    }
    assert model.config.hfkdq["vocabulary"]["max_size"] == 6


@pytest.mark.parametrize("make", [bert, gpt2, t5])
def test_a_limit_holds_with_all_that_tokens_need(make, tmp_path):
    whole = Pruned(make, tmp_path / "tokenizer")
    limit = len(whole.tokenizer) - 7

    def same(folder):  # two trainings of a tokenizer may differ in ties
        return copy.deepcopy(whole.old_model), AutoTokenizer.from_pretrained(folder), whole.per_row

    small = Pruned(same, tmp_path / "tokenizer", max_size=limit)
    assert limit - 3 <= len(small.tokenizer) <= limit
    assert set(small.new_ids) < set(whole.new_ids)
    written = 0
    for text in CORPUS:
        old, new = small.old(text), small.tokenizer(text)
        assert len(new["input_ids"]) >= len(old["input_ids"])
        if new["input_ids"].count(small.tokenizer.unk_token_id) == old["input_ids"].count(small.old.unk_token_id):
            written += 1
            assert small.tokenizer.decode(new["input_ids"]) == small.old.decode(old["input_ids"])
    assert written >= len(CORPUS) - 2  # a character that occurs once may go with its word


def test_what_is_named_is_kept(tmp_path):
    pruned = Pruned(gpt2, tmp_path / "tokenizer", keep=["Ġwhistles", " forgets the planet"])
    vocabulary = pruned.tokenizer.get_vocab()
    assert {"Ġwhistles", "Ġforgets", "Ġplanet"} <= set(vocabulary)
    assert "Ġgathers" not in vocabulary
    assert pruned.tokenizer.tokenize(" forgets the planet whistles") == pruned.old.tokenize(
        " forgets the planet whistles"
    )


def test_every_form_of_a_corpus_counts_the_same(tmp_path):
    words = [text.split() for text in CORPUS]
    ids = word_level(tmp_path / "ids")(CORPUS, add_special_tokens=False)["input_ids"]
    data = Dataset.from_dict({"text": CORPUS, "other": ["engine"] * len(CORPUS), "label": [0] * len(CORPUS)})
    forms = {
        "list": (CORPUS, {}),
        "generator": ((text for text in CORPUS), {}),
        "numbers": (ids, {}),
        "dictionaries": ([{"text": text} for text in CORPUS], dict(column="text")),
        "data set": (data, dict(column="text")),
        "columns": (data, dict(column=["text", "other"])),
        "words": (words, {}),
    }
    found = {}
    for name, (corpus, kwargs) in forms.items():
        tokenizer = word_level(tmp_path / name)
        model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **BODY))
        prune_vocabulary(model, tokenizer, corpus, **kwargs)
        found[name] = set(tokenizer.get_vocab())
    assert "engine" not in found["list"]
    assert found.pop("columns") == found["list"] | {"engine"}
    assert all(tokens == found["list"] for tokens in found.values())


def test_long_texts_are_counted_whole_and_settings_stay(tmp_path):
    model, tokenizer, _ = bert(tmp_path / "tokenizer")
    before = tokenizer.tokenize(" ".join(CORPUS))
    tokenizer(["a", "b"], truncation=True, max_length=4, padding="max_length")
    backend = tokenizer.backend_tokenizer
    settings = (backend.truncation, backend.padding)
    assert settings[0]["max_length"] == settings[1]["length"] == 4
    prune_vocabulary(model, tokenizer, [" ".join(CORPUS)])
    backend = tokenizer.backend_tokenizer
    assert (backend.truncation, backend.padding) == settings
    assert tokenizer.tokenize(" ".join(CORPUS)) == before


def test_added_tokens_keep_their_order_behind_the_vocabulary(tmp_path):
    model, tokenizer, _ = bert(tmp_path / "tokenizer")
    tokenizer.add_tokens(["<tool>", "whistles-and-bells"])
    model.resize_token_embeddings(len(tokenizer))
    rows = model.get_input_embeddings().weight[-2:].clone()
    prune_vocabulary(model, tokenizer, CORPUS)
    assert tokenizer.convert_tokens_to_ids(["<tool>", "whistles-and-bells"]) == [
        len(tokenizer) - 2,
        len(tokenizer) - 1,
    ]
    assert torch.equal(model.get_input_embeddings().weight[-2:], rows)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.tokenize("a <tool> river") == ["a", "<tool>", "river"]


def test_languages_follow(tmp_path):
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    languages = ["deu_Latn", "eng_Latn", "fra_Latn"]
    backend.add_special_tokens([*languages, "<mask>"])
    tokenizer = saved_tokenizer(
        tmp_path / "tokenizer", backend, tokenizer_class="NllbTokenizer", additional_special_tokens=languages, src_lang="fra_Latn", tgt_lang="deu_Latn",
    )  # fmt: skip
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **BODY))
    old = [tokenizer(text).tokens() for text in CORPUS]
    assert old[0][0] == "fra_Latn"
    prune_vocabulary(model, tokenizer, CORPUS)
    french = tokenizer.get_vocab()["fra_Latn"]
    assert tokenizer.cur_lang_code == french
    assert tokenizer.prefix_tokens == [french]
    assert tokenizer.suffix_tokens == [tokenizer.eos_token_id]
    assert [tokenizer(text).tokens() for text in CORPUS] == old
    tokenizer.src_lang = "deu_Latn"
    assert tokenizer("river").tokens()[0] == "deu_Latn"


@pytest.mark.parametrize("make", [bert, gpt2])
def test_learned_scales_of_rows_follow(make, tmp_path):
    model, tokenizer, _ = make(tmp_path / "tokenizer")
    batches = [tokenizer(text, return_tensors="pt") for text in CORPUS]
    spec = QuantizationSpec(
        weight_bits=4, activation_bits=None, weight_estimator="learned", head_bits=4, embedding_bits=4
    )
    prepare_qat_(model, spec)
    old = [logits_of(model, batch["input_ids"]) for batch in batches]
    kept = dict(tokenizer.get_vocab().items())
    prune_vocabulary(model, tokenizer, CORPUS)
    kept = [kept[token] for token in sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)]
    scale = model.get_input_embeddings().weight_quantizer.scale
    assert scale.shape[0] == len(tokenizer)
    for text, logits in zip(CORPUS, old, strict=True):
        new = logits_of(model, torch.tensor([tokenizer(text)["input_ids"]]))
        torch.testing.assert_close(new, logits[..., kept], rtol=0, atol=1e-6)


def test_merges_name_every_symbol_on_the_way():
    pairs = ["l o", "o w", "lo w", "n e", "ne w", "e r</w>", "low er</w>", "x y"]
    merges = Merges(pairs, "", "</w>")
    assert merges.parts("lower</w>") == {"l", "o", "w", "e", "r</w>", "lo", "low", "er</w>", "lower</w>"}
    assert merges.among({"l", "o", "w", "lo", "low", "ow", "n", "e"}) == [["l", "o"], ["o", "w"], ["lo", "w"]]
    inside = Merges([["a", "##b"], ["##c", "##d"], ["ab", "##cd"]], "##", "")
    assert inside.parts("abcd") == {"a", "##b", "##c", "##d", "ab", "##cd", "abcd"}
    assert inside.parts("##cd") == {"##c", "##d", "##cd"}


def backend_of(kind):
    """Backends of every kind, in Transformers' general class; rare shapes of byte-pair encodings among them."""
    special = ["[UNK]"]
    if kind == "unigram":
        backend, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(vocab_size=220, special_tokens=special, unk_token="[UNK]")  # fmt: skip
    elif kind == "word piece":
        backend, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer(vocab_size=300, special_tokens=special)  # fmt: skip
    else:
        shape = {"prefix": dict(continuing_subword_prefix="##"), "suffix": dict(end_of_word_suffix="</w>")}.get(
            kind, {}
        )
        backend = Tokenizer(models.BPE(unk_token="[UNK]", ignore_merges=kind == "whole words", **shape))
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, **shape)
    backend.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "unigram" else pre_tokenizers.Whitespace()
    backend.train_from_iterator([text for text in TEXTS if "東" not in text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


@pytest.mark.parametrize("kind", ["unigram", "word piece", "plain", "prefix", "suffix", "whole words"])
def test_whatever_the_corpus_it_is_cut_as_before(kind):
    """Corpora by chance, with words never seen in training and unknown characters."""
    choose = random.Random(0)
    letters = "".join(TEXTS[:300]) + "qQ東🙂"
    whole = backend_of(kind)
    for _ in range(12):
        noise = ["".join(choose.choices(letters, k=12)) for _ in range(6)]
        corpus = [*choose.sample(TEXTS, choose.randint(1, 12)), *noise]
        tokenizer = copy.deepcopy(whole)
        old = [tokenizer.tokenize(text) for text in corpus]
        model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **BODY))
        prune_vocabulary(model, tokenizer, corpus)
        assert [tokenizer.tokenize(text) for text in corpus] == old
        assert len(tokenizer) < len(whole)


def test_the_penalty_of_unknown_characters_stays():
    """It is measured from the lowest score of all, here of a token that the corpus does not use."""
    pieces = [("[UNK]", 0.0), ("a", -1.0), ("xa", -3.0), ("ax", -3.5), ("aa", -2.5), ("rare", -40.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    model = BertForSequenceClassification(BertConfig(vocab_size=6, pad_token_id=0, **BODY))
    prune_vocabulary(model, tokenizer, ["aa"])
    assert "rare" in tokenizer.get_vocab()


def test_special_tokens_behind_the_others_move_wherever_they_are_named():
    pieces = [("one", -2.0), ("two", -3.0), ("low", -9.0), ("a", -1.0), ("b", -2.0)]
    special = ["[PAD]", "[UNK]", "[SEP]"]
    backend = Tokenizer(models.Unigram([*pieces, *((token, 0.0) for token in special)], unk_id=6))
    backend.add_special_tokens(special)
    backend.enable_padding(pad_id=5, pad_token="[PAD]", length=8)
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing("$A [SEP]", "$A [SEP] $B [SEP]", [("[SEP]", 7)])]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    model = BertForSequenceClassification(BertConfig(vocab_size=8, pad_token_id=5, **BODY))
    tokenizer("ab", padding="max_length", max_length=8)
    prune_vocabulary(model, tokenizer, ["aab"])
    assert tokenizer.get_vocab() == {"low": 0, "a": 1, "b": 2, "[PAD]": 3, "[UNK]": 4, "[SEP]": 5}
    assert tokenizer.backend_tokenizer.encode("aab☃").ids == [1, 1, 2, 4, 5, 3, 3, 3]
    assert (
        tokenizer.pad_token_id == model.config.pad_token_id == model.bert.embeddings.word_embeddings.padding_idx == 3
    )


def test_nothing_to_remove_changes_nothing(tmp_path):
    model, tokenizer, _ = bert_of_words(tmp_path / "tokenizer")
    vocabulary, table = tokenizer.get_vocab(), model.get_input_embeddings().weight
    prune_vocabulary(model, tokenizer, TEXTS)
    assert tokenizer.get_vocab() == vocabulary
    assert torch.equal(model.get_input_embeddings().weight, table)
    fact = model.config.hfkdq["vocabulary"]
    assert fact["tokens_before"] == fact["tokens_after"] == len(vocabulary)


def with_small_table(model, tokenizer):
    model.resize_token_embeddings(len(tokenizer) - 3)


def with_wrong_size(model, tokenizer):
    model.config.vocab_size += 8


def with_adapter(model, tokenizer):
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=2, target_modules=["word_embeddings"]))


def with_low_rank_updates(model, tokenizer):
    model.cls.predictions.decoder.adapter = torch.nn.Linear(2, 2)  # as quantization-aware training puts it there


def with_integers(model, tokenizer):
    model.get_input_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.char(), False)


def with_dropout(model, tokenizer):
    tokenizer._tokenizer = Tokenizer(models.BPE({"a": 0}, [], dropout=0.1))


def with_python_parts(model, tokenizer):
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())


@pytest.mark.parametrize(
    ("spoil", "corpus", "kwargs", "message"),
    [
        (with_small_table, CORPUS, {}, r"The tokenizer has ids up to \d+, the embedding table .* has \d+ rows"),
        (with_wrong_size, CORPUS, {}, r"\d+ rows, which no vocab_size .* Change tables with resize_token_embeddings"),
        (with_adapter, CORPUS, {}, "has an adapter .* Merge the adapters"),
        (with_low_rank_updates, CORPUS, {}, "An adapter stands beside .* Merge the adapters first"),
        (with_integers, CORPUS, {}, "int8 on cpu; only floating-point rows .* Load the model without quantization"),
        (with_dropout, CORPUS, {}, r"dropout=0.1.*Set tokenizer.backend_tokenizer.model.dropout = None"),
        (with_python_parts, CORPUS, {}, "cannot be written as JSON"),
        (None, [], {}, "corpus has not one token"),
        (None, CORPUS[0], {}, "one str. Pass a list of texts"),
        (None, DatasetDict(train=Dataset.from_dict({"text": CORPUS})), {}, "one split of a DatasetDict"),
        (None, Dataset.from_dict({"text": CORPUS}), {}, r"columns 'text'. .*column='text'"),
        (None, [{"a": "b"}], dict(column="text"), r"column=\['text'\], but a row of the corpus has the columns 'a'"),
        (None, CORPUS, dict(column="text"), "has no columns"),
        (None, [None], {}, r"row of the corpus is None \(NoneType\)"),
        (None, [[0, 10**6]], {}, r"ids that the tokenizer lacks, such as \[1000000\]"),
        (None, CORPUS, dict(min_count=0), "min_count must be a whole number from 1, got 0"),
        (None, CORPUS, dict(max_size=3), "max_size=3 is less than the 5 tokens that must stay"),
        (None, CORPUS, dict(max_size=0.5), "max_size must be a whole number"),
        (None, CORPUS, dict(keep="river"), r"Write keep=\['river'\]"),
        (None, CORPUS, dict(keep=["東"]), "keep has '東', which the tokenizer does not know"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_changed(spoil, corpus, kwargs, message, tmp_path):
    tokenizer = word_piece(tmp_path / "tokenizer", size=150)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **BODY))
    if spoil is not None:
        spoil(model, tokenizer)
    backend = tokenizer.backend_tokenizer
    vocabulary, config = tokenizer.get_vocab(), model.config.to_dict()
    weights = {name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()}
    if kwargs.get("keep") == ["東"]:
        kwargs = dict(keep=["\u2603"])
        message = message.replace("東", "\u2603")
    with pytest.raises(ValueError, match=message):
        prune_vocabulary(model, tokenizer, corpus, **kwargs)
    assert tokenizer.backend_tokenizer is backend
    assert tokenizer.get_vocab() == vocabulary
    assert model.config.to_dict() == config
    assert {name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()} == weights


class FixedHead(BertPreTrainedModel):
    """A model with a head whose rows are not in its configuration."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.head = torch.nn.Linear(WIDTH, ROWS)
        self.post_init()

    def get_output_embeddings(self):
        return self.head


class OtherArguments(BertPreTrainedModel):
    def __init__(self, config, body):
        super().__init__(config)
        self.bert = body


ROWS = 150


def test_models_that_could_not_be_loaded_are_refused(tmp_path):
    tokenizer = word_piece(tmp_path / "tokenizer", size=ROWS)
    config = BertConfig(vocab_size=ROWS, tie_word_embeddings=False, **BODY)
    with pytest.raises(ValueError, match="A Linear of FixedHead has 150 rows that vocab_size doesn't describe"):
        prune_vocabulary(FixedHead(config), tokenizer, CORPUS)
    with pytest.raises(ValueError, match=r"OtherArguments cannot be built from its configuration with 150 tokens"):
        prune_vocabulary(OtherArguments(config, BertModel(config)), tokenizer, CORPUS)
    assert len(tokenizer) == ROWS


def test_the_former_vocabulary_file_is_not_saved_again(tmp_path):
    """Transformers 4 copies the SentencePiece model that a tokenizer came from."""
    model, tokenizer, _ = t5(tmp_path / "tokenizer")
    (tmp_path / "spiece.model").write_bytes(b"the former vocabulary")
    tokenizer.vocab_file = str(tmp_path / "spiece.model")
    tokenizer.slow_tokenizer_class = PreTrainedTokenizer  # as it is where sentencepiece is installed
    prune_vocabulary(model, tokenizer, CORPUS)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "spiece.model").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("make", [gpt2, t5])
def test_what_a_tokenizer_was_built_from_follows(make, tmp_path):
    """The tokenizers of Transformers 5 keep it, and some save it."""
    tokenizer = Pruned(make, tmp_path / "tokenizer").tokenizer
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    for name, key in (("_vocab", "vocab"), ("_merges", "merges"), ("_vocab_scores", "vocab")):
        kept = vars(tokenizer).get(name, model.get(key))
        assert json.loads(json.dumps(kept)) == model.get(key)


def test_models_and_tokenizers_of_other_kinds_are_refused(tmp_path):
    from transformers import ByT5Tokenizer

    tokenizer = word_piece(tmp_path / "tokenizer")
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **BODY))
    with pytest.raises(ValueError, match=r"ByT5Tokenizer is no fast tokenizer.*use_fast=True"):
        prune_vocabulary(model, ByT5Tokenizer(), CORPUS)
    with pytest.raises(ValueError, match=r"got Linear\. Unwrap the model first"):
        prune_vocabulary(torch.nn.Linear(2, 2), tokenizer, CORPUS)
    with pytest.raises(ValueError, match="ViTModel has no embedding table for tokens"):
        prune_vocabulary(ViTModel(ViTConfig(image_size=8, patch_size=4, **BODY)), tokenizer, CORPUS)
