# SPDX-License-Identifier: Apache-2.0
"""Taking tokens that a corpus does not use out of a model and its tokenizer, both together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...bars import progress_bar
from ...facts import record_fact, refresh_facts
from .rows import VocabularyRows, renumbered
from .tokenizers import TokenizerVocabulary

BATCH = 1000


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Iterable[Any],
    *,
    column: str | Sequence[str] | None = None,
    min_count: int = 1,
    max_size: int | None = None,
    keep: Sequence[str] = (),
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    r"""Takes the tokens that a corpus does not use out of `model` and `tokenizer`, both changed in place.

    What goes are rows: of the embedding tables and the language modelling head, their bias, and nothing else. Those
    left keep their order and values, so every logit that is left is what it was; with rows of width `d` in `t`
    untied tables, `removed * d * t` parameters are saved. `vocab_size` and all ids that the configuration and the
    generation configuration name follow; ties stay ties. Afterwards `save_pretrained` and plain `from_pretrained`
    work for both, and an optimizer that holds the former parameters is stale. The way of Yang et al.,
    "TextPruner: A Model Pruning Toolkit for Pre-Trained Language Models" (2022), and Abdaoui et al., "Load What You
    Need: Smaller Versions of Multilingual BERT" (2020).

    Kept are the tokens that the corpus uses at least `min_count` times, whole texts counted, without truncation;
    special and added tokens; what configurations name (`pad_token_id`, `suppress_tokens`, ...); the letters for bytes
    and the byte tokens; `keep`; the characters that a kept token is written with, and those that are written at least
    `min_count` times; of a byte-pair encoding all that its merges pass through; where positions are counted from the
    id of padding, as in RoBERTa, every lower id.

    Guaranteed, with `min_count=1` and without `max_size`: every text of the corpus is cut into the same tokens as
    before, and a model gives the same hidden states for it. Not guaranteed: other texts, and with `min_count` or
    `max_size` also those of the corpus, may be cut into smaller pieces, or have unknown tokens where the vocabulary
    has neither bytes nor their characters. A language model spreads its probability over fewer tokens, and can write no
    others. Texts must be given as the model sees them: with the chat template and prompts.

    Args:
        model (`PreTrainedModel`): a model with a table of tokens, in floating point; it may be in the middle of
            quantization-aware training.
        tokenizer (`PreTrainedTokenizerBase`): its fast tokenizer: WordPiece, WordLevel, BPE or Unigram.
        corpus (iterable of `str`, or `datasets.Dataset`): the texts. A row may also be a list of words, or a list of
            ids of `tokenizer`.
        column (`str` or sequence of `str`, *optional*): the column or columns of the rows to read, for a data set
            or rows that are dictionaries.
        min_count (`int`, *optional*, defaults to 1): how often a token must occur to be kept for it.
        max_size (`int`, *optional*): at most so many tokens, the most frequent; everything else that is kept counts.
        keep (sequence of `str`, *optional*, defaults to `()`): more to keep: tokens, or texts, of which all tokens
            are kept.

    Returns:
        `tuple[PreTrainedModel, PreTrainedTokenizerBase]`: the same model and the same tokenizer. What was done is in
        `model.config.hfkdq["vocabulary"]`: `tokens_before`, `tokens_after`, `rows_before`, `rows_after`,
        `parameters_before`, `parameters_after`, `min_count`, `max_size`.

    Raises:
        ValueError: a slow tokenizer or one of unknown type, a tokenizer that is not the model's (ids beyond the
            table), an empty corpus, a data set without `column`, a `max_size` below what must stay, a model with
            adapters or quantized (integer) tables. Model and tokenizer are then as they were.

    Example:
        ```python
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
        >>> from hfkdq import prune_vocabulary
        >>> words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "red", "green", "blue"])}
        >>> backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
        >>> config = BertConfig(
        ...     vocab_size=5, hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=2
        ... )
        >>> model, tokenizer = prune_vocabulary(BertModel(config), tokenizer, ["blue red", "red blue"])
        >>> model.config.vocab_size, tokenizer("red blue")["input_ids"]
        (4, [2, 3])

        ```
    """
    if not isinstance(min_count, int) or min_count < 1:
        raise ValueError(f"min_count must be a whole number from 1, got {min_count!r}. With 1, all that occurs stays.")
    if max_size is not None and (not isinstance(max_size, int) or max_size < 1):
        raise ValueError(f"max_size must be a whole number from 1 or None, got {max_size!r}.")
    if isinstance(keep, str):
        raise ValueError(f"keep must be a sequence of tokens or texts, got {keep!r}. Write keep=[{keep!r}].")
    rows, vocabulary = VocabularyRows(model), TokenizerVocabulary(tokenizer)
    last = max(vocabulary.ids.values())
    if last >= rows.rows:
        raise ValueError(
            f"The tokenizer has ids up to {last}, the embedding table of {type(model).__name__} has {rows.rows} rows: "
            "they don't belong together. Pass the tokenizer that the model was trained with, or call "
            "model.resize_token_embeddings(len(tokenizer)) first."
        )
    counts = _count(vocabulary, corpus, column)
    named = rows.named_ids() | rows.fixed_ids()
    required = vocabulary.required()
    required.update(*(vocabulary.needed(id_) for id_ in named & vocabulary.tokens.keys()))
    required.update(*(vocabulary.needed_by_text(text) for text in keep))
    kept = _choose(vocabulary, counts, required, min_count, max_size)
    order = [*kept, *sorted(named - vocabulary.tokens.keys())]  # rows without a token come last
    new = {old: place for place, old in enumerate(order)}

    def renumber(id_: int) -> int:
        return new.get(id_, id_)

    if any(renumber(id_) != id_ for id_ in rows.fixed_ids()):
        raise ValueError(
            f"{type(model).__name__} counts positions from the id of padding, which would move, as the tokenizer has "
            "no tokens for some lower ids. Its vocabulary cannot be pruned."
        )
    backend = vocabulary.rewritten(kept)
    dims = rows.check(len(order), renumber)

    fact = {"tokens_before": len(vocabulary.ids), "tokens_after": len(kept), "rows_before": rows.rows}
    fact |= {"rows_after": len(order), "parameters_before": model.num_parameters()}
    vocabulary.replace_(backend, lambda value: renumbered(value, renumber))
    rows.keep_(dims, torch.tensor(order), renumber)
    refresh_facts(model)
    fact |= {"parameters_after": model.num_parameters(), "min_count": min_count}
    record_fact(model, "vocabulary", fact | ({} if max_size is None else {"max_size": max_size}))
    return model, tokenizer


def _choose(
    vocabulary: TokenizerVocabulary, counts: Counter[int], required: set[int], min_count: int, max_size: int | None
) -> list[int]:
    """The ids to keep, ascending: what is required, then the most frequent with all that they need. A character counts
    wherever it is written, so that it comes before the tokens that it could stand in for."""
    if max_size is not None and len(required) > max_size:
        raise ValueError(
            f"max_size={max_size} is less than the {len(required)} tokens that must stay: special and added tokens, "
            "those for bytes, those that configurations name, and keep. Raise it, or keep fewer."
        )
    written = Counter[int]()
    for id_, count in counts.items():
        written.update(dict.fromkeys(vocabulary.characters(id_), count))
    counts = counts | written  # the larger of both
    kept = set(required)
    for id_, count in sorted(counts.items(), key=lambda item: (-item[1], item[0] not in written, item[0])):
        if count < min_count:
            break
        missing = vocabulary.needed(id_) - kept
        if max_size is None or len(kept) + len(missing) <= max_size:
            kept |= missing
    return sorted(kept)


def _count(vocabulary: TokenizerVocabulary, corpus: Iterable[Any], column: str | Sequence[str] | None) -> Counter[int]:
    if isinstance(corpus, (str, Mapping)):
        raise ValueError(
            f"corpus must be an iterable of texts or a data set, got one {type(corpus).__name__}. Pass a list of "
            "texts, or one split of a DatasetDict: corpus=data['train']."
        )
    backend, counts = vocabulary.counting_backend(), Counter[int]()
    columns = [column] if isinstance(column, str) else column
    if columns is not None and hasattr(corpus, "select_columns"):  # a data set need not read the others
        corpus = corpus.select_columns(list(columns))
    rows = _rows(corpus, columns)
    total = len(corpus) * len(columns or [""]) if isinstance(corpus, Sized) else None
    with progress_bar(total=total, desc="Counting tokens", unit="text") as bar:
        while batch := list(islice(rows, BATCH)):
            texts = [row for row in batch if isinstance(row, str)]
            lists = [row for row in batch if not isinstance(row, str) and len(row)]
            words = [row for row in lists if isinstance(row[0], str)]
            encoded = backend.encode_batch(texts, add_special_tokens=False)
            encoded += backend.encode_batch(words, is_pretokenized=True, add_special_tokens=False)
            for encoding in encoded:
                counts.update(encoding.ids)
            counts.update(int(id_) for row in lists if not isinstance(row[0], str) for id_ in row)
            bar.update(len(batch))
    unknown = sorted(counts.keys() - vocabulary.tokens.keys())
    if unknown or not counts:
        what = f"has ids that the tokenizer lacks, such as {unknown[:3]}" if unknown else "has not one token"
        raise ValueError(f"The corpus {what}. Pass texts, or ids of this very tokenizer, that the model will see.")
    return counts


def _rows(corpus: Iterable[Any], columns: Sequence[str] | None) -> Iterator[Any]:
    """The texts, lists of words and lists of ids of the corpus, one after the other."""
    for row in corpus:
        if columns is None and isinstance(row, Mapping):
            raise ValueError(
                f"The rows of the corpus have the columns {', '.join(map(repr, row))}. Name the one with the text: "
                f"column={next(iter(row), 'text')!r}."
            )
        if columns is not None and (not isinstance(row, Mapping) or any(name not in row for name in columns)):
            had = f"the columns {', '.join(map(repr, row))}" if isinstance(row, Mapping) else "no columns"
            raise ValueError(f"column={columns!r}, but a row of the corpus has {had}. Name columns of all rows.")
        for value in [row] if columns is None else [row[name] for name in columns]:
            if not isinstance(value, str) and not hasattr(value, "__len__"):
                raise ValueError(
                    f"A row of the corpus is {value!r} ({type(value).__name__}); expected a text, a list of words or "
                    "a list of ids. Filter such rows out."
                )
            yield value
