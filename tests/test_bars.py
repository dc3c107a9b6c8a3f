# SPDX-License-Identifier: Apache-2.0
"""Progress bars: drawn on a terminal, and nowhere else."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

import hfkdq
from hfkdq.bars import progress_bar
from hfkdq.quantization import quantize

from . import tiny


class Stream(io.StringIO):
    """Standard error as a terminal or as a file."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_calibration_draws_its_bar_on_a_terminal_alone(monkeypatch, is_terminal):
    monkeypatch.setattr(sys, "stderr", stream := Stream(is_terminal))
    quantize(tiny.bert(), hfkdq.QuantizationSpec(), tiny.text_dataset(8), processing_class=tiny.tokenizer())
    assert ("batch/s" in stream.getvalue()) == is_terminal
    assert is_terminal or not stream.getvalue()


def test_who_hides_bars_sees_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Stream(True))
    assert list(progress_bar(range(3), disable=True)) == [0, 1, 2]
    logging.disable_progress_bar()
    try:
        assert list(progress_bar(range(3))) == [0, 1, 2]
    finally:
        logging.enable_progress_bar()
    assert not stream.getvalue()


def test_all_bars_are_made_in_one_place():
    files = sorted(Path(hfkdq.__file__).parent.rglob("*.py"))
    assert [path.name for path in files if re.search(r"\btqdm\(|import tqdm", path.read_text("utf-8"))] == ["bars.py"]
