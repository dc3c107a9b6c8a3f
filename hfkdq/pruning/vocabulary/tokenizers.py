# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of a fast tokenizer: required tokens, and the same tokenizer with fewer tokens."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

MODEL_TYPES = ("BPE", "Unigram", "WordLevel", "WordPiece")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Ids that tokenizers of many languages keep beside their backend, in each shape that they come in.
CACHED_IDS = ("cur_lang_code", "cur_lang_code_id", "cur_lang_id", "prefix_tokens", "suffix_tokens")
CACHED_TABLES = ("lang_code_to_id", "lang_token_to_id", "fairseq_tokens_to_ids")
CACHED_NAMES = ("id_to_lang_code", "id_to_lang_token", "fairseq_ids_to_tokens")


class TokenizerVocabulary:
    """The tokens of a fast tokenizer, which of them cannot go, and what each of the others needs. The tokenizer, a
    fast one, is left alone until `replace_`. Raises `ValueError`: a slow tokenizer, or a backend whose parts are not
    known."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        state = _checked_state(tokenizer)
        self.model: dict[str, Any] = state.pop("model")
        self.state = state
        self.ids: dict[str, int] = dict(tokenizer.get_vocab())
        self.tokens = {id_: token for token, id_ in self.ids.items()}
        entries = self.model["vocab"]
        self.base: list[str] = [entry[0] for entry in entries] if isinstance(entries, list) else list(entries)
        added = {entry["content"] for entry in state["added_tokens"]}
        self._special = added | set(tokenizer.all_special_tokens) | {self.model.get("unk_token")}
        self._bare = self.counting_backend()
        self._prefix = self.model.get("continuing_subword_prefix") or ""
        self._suffix = self.model.get("end_of_word_suffix") or ""
        self._merges = Merges(self.model["merges"], self._prefix, self._suffix) if "merges" in self.model else None

    def counting_backend(self) -> Tokenizer:
        """A copy of the backend that neither truncates nor pads."""
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.backend_tokenizer.encode_special_tokens
        return backend

    def required(self) -> set[int]:
        """The ids that stay whatever a corpus says."""
        tokens = self._special | {token for token in self.base if BYTE_TOKEN.fullmatch(token)}
        if self.model["type"] == "Unigram":
            # The penalty of unknown characters is measured from the lowest score.
            tokens.add(min(self.model["vocab"], key=lambda entry: entry[1])[0])
        elif self.model["type"] == "BPE" and _mentions_bytes(self.state):
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            tokens |= {form for character in alphabet for form in self._forms(character)}
        named = {holder[key] for holder, key in _id_slots(self.state, self.model)}
        return {self.ids[token] for token in tokens if token in self.ids} | {i for i in named if i in self.tokens}

    def needed(self, id_: int) -> set[int]:
        """The ids without which token `id_` would not be found, or its characters be unknown in other words."""
        parts = {id_} | self.characters(id_)
        if self._merges is not None and self.tokens[id_] not in self._special:
            parts |= {self.ids[part] for part in self._merges.parts(self.tokens[id_]) if part in self.ids}
        return parts

    def characters(self, id_: int) -> set[int]:
        """The ids of the characters that token `id_` is written with, in every place of a word."""
        token = self.tokens[id_]
        if self.model["type"] == "WordLevel" or token in self._special:
            return set()
        bare = token.removeprefix(self._prefix) if len(token) > len(self._prefix) else token
        forms = (form for character in bare.removesuffix(self._suffix) for form in self._forms(character))
        return {self.ids[form] for form in forms if form in self.ids}

    def needed_by_text(self, text: str) -> set[int]:
        """The ids of `text`: of the token that it is, or else of the tokens that it is cut into."""
        if text in self.ids:
            return self.needed(self.ids[text])
        unknown = self.ids.get(self.tokenizer.unk_token) if self.tokenizer.unk_token is not None else None
        found = set(self._bare.encode(text, add_special_tokens=False).ids) - {unknown}
        if not found:
            raise ValueError(f"keep has {text!r}, which the tokenizer does not know. Name tokens or known texts.")
        return {needed for id_ in found for needed in self.needed(id_)}

    def rewritten(self, kept: Sequence[int]) -> Tokenizer:
        """The backend with the tokens `kept` only, old ids in ascending order; the new id is the place among them."""
        new = {old: place for place, old in enumerate(kept)}
        state, model = copy.deepcopy(self.state), dict(self.model)
        if isinstance(model["vocab"], list):
            model["vocab"] = [entry for entry in model["vocab"] if self.ids[entry[0]] in new]
        else:
            model["vocab"] = {token: new[id_] for token, id_ in model["vocab"].items() if id_ in new}
        if self._merges is not None:
            model["merges"] = self._merges.among(model["vocab"])
        for holder, key in _id_slots(state, model):
            holder[key] = new.get(holder[key], holder[key])
        backend = Tokenizer.from_str(json.dumps({**state, "model": model}))
        backend.encode_special_tokens = self.tokenizer.backend_tokenizer.encode_special_tokens
        if backend.get_vocab() != {self.tokens[old]: place for old, place in new.items()}:
            raise ValueError(
                "The tokenizer numbers its tokens in a way that the tokenizers library would not give back: tokens "
                "that were added must come after those of its model. Save and load the tokenizer once, and resize "
                "the model if ids change."
            )
        return backend

    def replace_(self, backend: Tokenizer, renumber: Callable[[Any], Any]) -> None:
        """Puts `backend` into the tokenizer, whose own notes of ids follow it."""
        state = vars(self.tokenizer)
        for name in state.keys() & {*CACHED_IDS}:
            state[name] = renumber(state[name])
        for name in state.keys() & {*CACHED_TABLES}:
            state[name] = {token: renumber(id_) for token, id_ in state[name].items()}
        for name in state.keys() & {*CACHED_NAMES}:
            state[name] = {renumber(id_): token for id_, token in state[name].items()}
        self.tokenizer._tokenizer = backend
        model = json.loads(backend.to_str())["model"]
        for name, key in (("_vocab", "vocab"), ("_vocab_scores", "vocab"), ("_merges", "merges")):
            if name in state and key in model:  # what its class in Transformers 5 was built from
                state[name] = [tuple(e) for e in model[key]] if isinstance(model[key], list) else model[key]
        if state.get("vocab_file") is not None:  # the former vocabulary, which would be copied beside the new one
            self.tokenizer.vocab_file = None

    def _forms(self, character: str) -> set[str]:
        """`character` as it may stand in a word: at its start, inside it, at its end."""
        starts = {character, self._prefix + character}
        return starts | {start + self._suffix for start in starts}


def _checked_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The backend of `tokenizer` as JSON, if all of it is known."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is no fast tokenizer, and only those have a vocabulary in one known form. "
            "Load the tokenizer with AutoTokenizer.from_pretrained(..., use_fast=True); of a processor pass its "
            "tokenizer."
        )
    try:
        state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(
            f"The tokenizer cannot be written as JSON ({error}), so it could not be saved either. Take custom parts "
            "written in Python out of it first."
        ) from error
    model = state["model"]
    if model.get("type") not in MODEL_TYPES:
        raise ValueError(
            f"The tokenizer's model is of type {model.get('type')!r}; what may be taken out of it is known for "
            f"{', '.join(MODEL_TYPES)}."
        )
    if model.get("dropout"):
        raise ValueError(
            f"The tokenizer drops merges at random (dropout={model['dropout']}), so what a corpus uses is not certain. "
            "Set tokenizer.backend_tokenizer.model.dropout = None first."
        )
    list(_id_slots(state, model))
    return state


def _id_slots(state: dict[str, Any], model: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Every place outside the vocabulary where an id stands, as its holder and the key in it."""
    yield from ((entry, "id") for entry in state["added_tokens"])
    if state["padding"] is not None:
        yield state["padding"], "pad_id"
    if model.get("unk_id") is not None:
        yield model, "unk_id"
    processors = [state["post_processor"]] if state["post_processor"] is not None else []
    while processors:
        processor = processors.pop()
        kind = processor["type"]
        if kind == "Sequence":
            processors.extend(processor["processors"])
        elif kind == "TemplateProcessing":
            for special in processor["special_tokens"].values():
                yield from ((special["ids"], place) for place in range(len(special["ids"])))
        elif kind in ("BertProcessing", "RobertaProcessing"):
            yield from ((processor[name], 1) for name in ("sep", "cls"))
        elif kind != "ByteLevel":
            raise ValueError(f"The tokenizer's post-processor {kind} is not known; use TemplateProcessing instead.")


def _mentions_bytes(state: Any) -> bool:
    """Whether a normalizer or pre-tokenizer turns text into the 256 letters for bytes."""
    if isinstance(state, dict):
        return state.get("type") == "ByteLevel" or any(map(_mentions_bytes, state.values()))
    return isinstance(state, list) and any(map(_mentions_bytes, state))


class Merges:
    """The merges of a tokenizer by rank, as its JSON has them. `prefix` is what every symbol but the first of a word
    begins with, `suffix` what its last symbol ends with."""

    def __init__(self, merges: Sequence[str | Sequence[str]], prefix: str, suffix: str) -> None:
        self._pairs = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in merges]
        self._ranks = {pair: rank for rank, pair in enumerate(self._pairs)}
        self._prefix, self._suffix = prefix, suffix

    def parts(self, token: str) -> set[str]:
        """All symbols that come up while `token` is built. They are the same wherever it stands in a text: of the
        merges inside it, the first by rank goes first there too."""
        symbols = self._symbols(token)
        parts = set(symbols)
        while len(symbols) > 1:
            ranks = [self._ranks.get(pair, len(self._pairs)) for pair in pairwise(symbols)]
            place = ranks.index(min(ranks))
            if ranks[place] == len(self._pairs):
                break
            symbols[place : place + 2] = [self._merged(symbols[place], symbols[place + 1])]
            parts.add(symbols[place])
        return parts

    def among(self, vocabulary: Container[str]) -> list[list[str]]:
        """The merges whose two parts and result are in `vocabulary`, in their order."""
        return [list(pair) for pair in self._pairs if all(part in vocabulary for part in (*pair, self._merged(*pair)))]

    def _merged(self, left: str, right: str) -> str:
        return left + right[len(self._prefix) :]

    def _symbols(self, token: str) -> list[str]:
        """The characters that `token` starts from, as symbols."""
        inside = bool(self._prefix) and token.startswith(self._prefix) and len(token) > len(self._prefix)
        body = token[len(self._prefix) :] if inside else token
        ends = bool(self._suffix) and body.endswith(self._suffix) and len(body) > len(self._suffix)
        body = body[: -len(self._suffix)] if ends else body
        symbols = [self._prefix * (inside or place > 0) + character for place, character in enumerate(body)]
        if ends:
            symbols[-1] += self._suffix
        return symbols
