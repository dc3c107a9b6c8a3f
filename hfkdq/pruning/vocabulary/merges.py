# SPDX-License-Identifier: Apache-2.0
"""The merges of a byte-pair encoding: what a token is built from, and which merges some of the tokens leave."""

from __future__ import annotations

from collections.abc import Container, Sequence
from itertools import pairwise


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
