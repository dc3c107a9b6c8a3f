# SPDX-License-Identifier: Apache-2.0
"""Metrics of texts: named entities, answers, translations, transcripts. All over the field's own libraries."""

from __future__ import annotations

from collections.abc import Sequence as Rows

from datasets import Sequence, Value

from .base import LocalMetric, library


class EntityF1(LocalMetric):
    """Precision, recall and F1 of whole entities, and accuracy of tokens, by [seqeval](https://github.com/chakki-works/seqeval).

    An entity counts if its type and both of its ends are right, as in CoNLL. Predictions and references are lists of labels in the
    BIO scheme, such as `["O", "B-person", "I-person"]`, of one length.

    Example:
        ```python
        >>> from hfkdq.metrics import EntityF1
        >>> EntityF1().compute(predictions=[["B-x", "O", "B-y"]], references=[["B-x", "O", "O"]])["recall"]
        1.0

        ```
    """

    about = "Precision, recall and F1 of whole entities in [0, 1], and accuracy of tokens."
    citing = "Nakayama, seqeval: A Python framework for sequence labeling evaluation, 2018"
    prediction = Sequence(Value("string"))

    @staticmethod
    def score(predictions: Rows[Rows[str]], references: Rows[Rows[str]]) -> dict[str, float]:
        metrics = library("seqeval.metrics")
        pairs = [list(map(list, rows)) for rows in (references, predictions)]
        return {
            "precision": float(metrics.precision_score(*pairs, zero_division=0)),
            "recall": float(metrics.recall_score(*pairs, zero_division=0)),
            "f1": float(metrics.f1_score(*pairs, zero_division=0)),
            "accuracy": float(metrics.accuracy_score(*pairs)),
        }


class AnswerF1(LocalMetric):
    """Exact match and F1 of words of answers, both in [0, 1], as SQuAD v1.1 defines them, by torchmetrics.

    Predictions are texts; references are lists of texts, any of which is right. Case, articles and punctuation do not count.
    """

    about = "Share of answers that are one of the references, and F1 of their words, after SQuAD's normalization."
    citing = "Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016"
    prediction = Value("string")
    reference = Sequence(Value("string"))

    @staticmethod
    def score(predictions: Rows[str], references: Rows[Rows[str]]) -> dict[str, float]:
        squad = library("torchmetrics.functional.text").squad
        said = [{"prediction_text": text, "id": str(row)} for row, text in enumerate(predictions)]
        right = [
            {"answers": {"answer_start": [0] * len(texts), "text": list(texts)}, "id": str(row)}
            for row, texts in enumerate(references)
        ]
        return {name: float(value) / 100 for name, value in squad(said, right).items()}


class Bleu(LocalMetric):
    """BLEU and chrF of a corpus, in [0, 100] as [sacreBLEU](https://github.com/mjpost/sacrebleu) computes and signs them.

    Predictions are texts, references a text or several for each.
    """

    about = "BLEU and chrF of the corpus, in [0, 100]."
    citing = "Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018"
    prediction = Value("string")
    reference = Sequence(Value("string"))

    @staticmethod
    def score(predictions: Rows[str], references: Rows[str | Rows[str]]) -> dict[str, float]:
        sacrebleu = library("sacrebleu")
        several = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
        most = max(map(len, several))
        # One list for each rank of reference; texts that have fewer have none there.
        ranks = [[texts[rank] if rank < len(texts) else None for texts in several] for rank in range(most)]
        return {
            "bleu": float(sacrebleu.corpus_bleu(list(predictions), ranks).score),
            "chrf": float(sacrebleu.corpus_chrf(list(predictions), ranks).score),
        }


class WordErrorRate(LocalMetric):
    """Word and character error rate of a corpus of transcripts, by [jiwer](https://github.com/jitsi/jiwer).

    `(substitutions + deletions + insertions) / words of the references`; 0 is best, and more than 1 is possible.
    """

    about = "Errors for each word, and for each character, of the references; 0 is best."
    citing = "Morris et al., From WER and RIL to MER and WIL, Interspeech 2004"
    prediction = Value("string")

    @staticmethod
    def score(predictions: Rows[str], references: Rows[str]) -> dict[str, float]:
        jiwer = library("jiwer")
        if not any(text.strip() for text in references):
            raise ValueError(
                "All references are empty, so there is no word that could be wrong; use rows that have texts."
            )
        pair = list(references), list(predictions)
        return {"wer": float(jiwer.process_words(*pair).wer), "cer": float(jiwer.process_characters(*pair).cer)}
