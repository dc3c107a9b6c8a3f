# SPDX-License-Identifier: Apache-2.0
"""`docs/models.md` says what the files of results say, and a cell that is run comes out as the page says."""

import pytest

from benchmarks.models.cells import CELLS
from benchmarks.models.entries import ENTRIES
from benchmarks.models.page import FAILS, LINES, PAGE, REFUSED, WORKS, page, read
from benchmarks.models.running import LINE, apart, is_refusal, run_cell
from benchmarks.models.tasks import PREFIX

SAMPLE = [
    ("distilbert", "hidden"),
    ("own-cnn", "student"),
    ("resnet", "neuron"),
    ("own-gru", "QAT"),
    ("clip", "n:m"),
    ("bert", "task question-answering"),
]


def test_the_page_says_what_the_results_say():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_results_are_of_families_and_cells_that_there_are():
    for line in LINES:
        found = read(line)
        assert found["families"].keys() <= ENTRIES.keys()
        for results in found["families"].values():
            assert {name for name in results if not name.startswith(PREFIX)} <= CELLS.keys()
            assert {result["result"] for result in results.values()} <= {WORKS, REFUSED, FAILS}


def _check(family, cell):
    recorded = read(LINE)["families"].get(family, {}).get(cell)
    if recorded is None:
        pytest.skip("not run yet on this line")
    assert run_cell(ENTRIES[family], cell)["result"] == recorded["result"]


@pytest.mark.parametrize(("family", "cell"), SAMPLE)
def test_a_cell_comes_out_as_the_page_says(family, cell):
    _check(family, cell)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, entry in ENTRIES.items() if entry.exists])
@pytest.mark.parametrize("cell", ["student", "neuron", "QAT", "ONNX int8"])
def test_more_cells_come_out_as_the_page_says(family, cell):
    _check(family, cell)


def test_a_sign_per_line_and_each_reason_once():
    results = {
        "student": {"result": WORKS},
        "head": {"result": REFUSED, "why": "BertForSequenceClassification has none."},
    }
    alike = {**results, "head": {"result": REFUSED, "why": "RobertaForSequenceClassification has none."}}
    other = {"student": {"result": WORKS}, "head": {"result": FAILS, "why": "It crashes."}}
    found = {
        "optimum": {"versions": {}, "families": {"bert": results, "roberta": alike}},
        "v5": {"versions": {}, "families": {"bert": other}, "absent": ["roberta"]},
    }
    rows = {line.split(" | ")[0]: line.split(" | ") for line in page(found).splitlines() if line.startswith("| ")}
    heads = rows["| family"]
    assert rows["| BERT"][heads.index("student")] == "✓"
    assert rows["| BERT"][heads.index("head")] == "no 1 / ✗ 2"
    assert rows["| RoBERTa"][heads.index("student")] == "✓ / ·"
    assert rows["| RoBERTa"][heads.index("QAT")] == "? / ·"
    assert "1. BertForSequenceClassification has none. (BERT, head, and 1 more)" in page(found)


def test_what_dies_or_never_ends_fails():
    import os
    import time

    assert apart(lambda: os.abort(), 60)["why"] == "the process ended with signal 6"
    assert apart(lambda: time.sleep(60), 0.5)["why"] == "not done in 0 seconds"
    assert apart(lambda: {"result": WORKS}, 60) == {"result": WORKS}


def test_a_refusal_is_an_error_that_hfkdq_raises():
    from hfkdq import PruningSpec
    from hfkdq.pruning.masks import units_kept

    def raised(work):
        try:
            work()
        except Exception as error:
            return error

    assert is_refusal(raised(lambda: PruningSpec(sparsity=2.0)))
    assert not is_refusal(raised(lambda: int("a")))
    assert not is_refusal(raised(lambda: units_kept("a", 0.5)))  # a line of hfkdq that raises nothing itself
