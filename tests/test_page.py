# SPDX-License-Identifier: Apache-2.0
"""The page of a report: what stands in it, that it needs nothing but itself, and how a browser shows it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hfkdq.report import CompressionReport, DatasetInfo, Engine, Latency, Layer, Mistake
from hfkdq.report.charts import front
from hfkdq.report.curves import curves_of, read_curves

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECRET = "hf_" + "A1b2C3d4E5" * 3
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \"' </style> {{ 7*7 }} $x$ " + SECRET


def png() -> str:
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.fixture
def report() -> CompressionReport:
    layers = tuple(Layer(name=f"layer.{i}.weight", parameters=64, bits=8, sparsity=i / 4) for i in range(3))
    rounds = dict(calls=30, min_ms=1.9)
    engines = (
        Engine(name="teacher", kind="torch", metrics={"accuracy": 0.9, "f1": 0.88}, size=9_000_000, parameters=2_000_000,
               sparsity=0.0, latency=Latency(median_ms=8.0, min_ms=7.8, calls=30, rounds=(8.0, 8.2, 7.9)),
               intervals={"accuracy": [0.87, 0.92], "f1": [0.85, 0.9]}),
        Engine(name="student", kind="torch", metrics={"accuracy": 0.86, "f1": 0.84}, size=5_000_000, parameters=1_000_000,
               sparsity=0.25, latency=Latency(median_ms=4.0, min_ms=3.9, calls=30, rounds=(4.0, 4.1, 3.9)), layers=layers),
        Engine(name="ONNX int8", kind="onnx", metrics={"accuracy": 0.85, "f1": 0.83}, size=1_500_000,
               latency=Latency(median_ms=2.0, rounds=(2.0, 2.1, 1.9), **rounds), intervals={"accuracy": [0.81, 0.88]},
               changes={"accuracy": [-0.07, -0.03]},
               parity={"kind": "int8", "max_abs_diff": 0.02, "samples": 64, "tolerance": 0.1, "compared_on": "calibration"}),
    )  # fmt: skip
    mistakes = (
        Mistake(row=4, scores={"teacher": 1.0, "ONNX int8": 0.0}, said={"teacher": "cat", "ONNX int8": "dog"}, label="cat",
                texts={"text": "a small cat"}, media={"image": png(), "sound": "data:audio/wav;base64,UklGRg=="}),
    )  # fmt: skip
    return CompressionReport(
        engines=engines, architecture="BertForSequenceClassification", samples=400, task="text-classification",
        facts={"student": {"teacher_layers": 6, "layers": [2, 4, 6]}}, mistakes=mistakes,
        timing={"device": "cpu", "threads": 2, "rounds": 3, "inputs": {"input_ids": [1, 32]}},
        environment={"processor": "Some CPU", "torch": "2.13.0"}, dataset=DatasetInfo(name="Words", split="test"),
        curves={"loss": [[1.0, 2.0], [2.0, 1.5], [3.0, 1.2]], "logit_kd": [[1.0, 0.9], [2.0, 0.4]]},
    )  # fmt: skip


class Page(HTMLParser):
    """The elements of a page, with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def test_the_page_has_all_that_is_measured(report):
    page = Page(report.to_html())
    for words in (
        "ONNX int8 against teacher", "takes 17% of the bytes of teacher", "4.00 times as fast", "85.00 % accuracy instead of 90.00 %",
        "[81.00, 88.00]", "5.00", "[3.00, 7.00]", "[3.90, 4.16]", "400 examples", "Words", "a small cat", "Row 4",
        "layer.2.weight", "50.0", "logit_kd", "3 of the teacher's 6 layers", "Some CPU", "2.00e-02", "Compared on rows",
    ):  # fmt: skip
        assert words in page.text, words
    assert len(page.of("svg")) == 2 + 2 + 2  # by size and latency, curves, bits and zeros
    made_up = replace(report.engines[-1], parity={**report.engines[-1].parity, "compared_on": "made-up inputs"})
    assert "compared on random inputs" in replace(report, engines=(*report.engines[:-1], made_up)).to_html()


def test_what_is_not_known_leaves_no_section(report):
    engines = (Engine(name="file", kind="onnx", metrics={}, size=1000),)
    bare = Page(CompressionReport(engines=engines, architecture="Model", samples=0).to_html())
    assert not bare.of("svg")
    assert [attributes["id"] for attributes in bare.of("h2")] == ["results"]


def test_it_needs_nothing_from_elsewhere(report):
    text = report.to_html()
    page = Page(text)
    assert not page.of("script", "link", "iframe", "object", "base")
    addresses = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href", "xlink:href", "srcset")]  # fmt: skip
    assert addresses
    assert all(re.match(r"data:(image/png|audio/wav);base64,|#", address) for address in addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    policy = next(attributes["content"] for attributes in page.of("meta") if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


def test_names_are_there_once_and_what_points_at_them_is_there(report):
    second = replace(report.engines[1], name="student 2")
    page = Page(replace(report, engines=(*report.engines[:2], second, report.engines[2])).to_html())
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    pointed = [a[name] for _, a in page.elements for name in ("aria-labelledby",) if name in a]
    pointed += [a["xlink:href"][1:] for a in page.of("use")]
    assert set(pointed) <= set(names)


def test_those_who_do_not_see_it_are_told(report):
    page = Page(report.to_html())
    assert all(a.get("alt") for a in page.of("img"))
    assert all(a.get("aria-label") for a in page.of("audio"))
    told = [a["aria-label"] for a in page.of("div") if a.get("role") == "img"]
    assert len(told) == len(page.of("svg"))
    assert told[0].endswith("Not beaten in both: ONNX int8, student, teacher.")
    assert all(a.get("scope") in ("col", "row") for a in page.of("th"))
    assert page.of("html")[0]["lang"] == "en"


def test_text_from_elsewhere_is_text_and_secrets_are_not_told(report):
    name = HOSTILE.replace("\n", " ")
    mistake = replace(
        report.mistakes[0], texts={HOSTILE: HOSTILE}, label=HOSTILE, said={"teacher": HOSTILE}, scores={HOSTILE: 1.0}
    )
    hostile = replace(
        report, mistakes=(mistake,), dataset=DatasetInfo(name=name), base_model=name, environment={name: name},
        engines=tuple(replace(engine, name=f"{name}{i}", metrics={name: 0.5}) for i, engine in enumerate(report.engines)),
        curves={HOSTILE: [[1.0, 2.0], [2.0, 1.0]]}, facts={"own": {HOSTILE: HOSTILE}},
    )  # fmt: skip
    text = hostile.to_html()
    page = Page(text)
    assert not page.of("script")
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert "<script>alert(1)</script>" in page.text
    assert "49" not in re.findall(r"\{\{ (\d+) \}\}|\b49\b", page.text)
    assert SECRET not in text
    assert "‮" not in replace(report, environment={"torch": "2"}, facts={"own": {"a": "x‮y"}}).to_html().split("<pre")[0]


def test_media_that_are_none_are_refused(report):
    for address in ("http://example.com/x.png", "data:text/html;base64,AAAA", "javascript:alert(1)"):
        wrong = replace(report, mistakes=(replace(report.mistakes[0], media={"image": address}),))
        with pytest.raises(ValueError, match=r"mistakes\[0\]\.media"):
            wrong.to_html()


def test_the_front_has_what_none_beats_in_both():
    assert front([1.0, 2.0, 3.0, 2.0], [5.0, 7.0, 6.0, 6.0]) == [0, 1]
    assert front([1.0, 1.0], [2.0, 3.0]) == [1]


def test_curves_are_read_off_the_log_of_a_training(tmp_path):
    log = [
        {"step": 1, "epoch": 0.1, "loss": 2.0, "logit_kd": 1.0, "learning_rate": 0.1, "grad_norm": 1.0},
        {"step": 2, "epoch": 0.2, "loss": 1.0, "logit_kd": 0.5, "learning_rate": 0.1, "bad": float("nan")},
        {"step": 2, "eval_loss": 3.0, "eval_runtime": 1.0, "eval_samples_per_second": 5.0},
        {"step": 2, "train_runtime": 10.0, "train_loss": 1.5},
    ]
    known = {"loss": [[1.0, 2.0], [2.0, 1.0]], "logit_kd": [[1.0, 1.0], [2.0, 0.5]]}
    assert curves_of(log) == known
    assert read_curves(tmp_path) == {}
    log[1].pop("bad")
    for step, entries in (("2", log[:1]), ("10", log)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert read_curves(tmp_path) == known


def browsed(page: str, folder, width: int) -> dict:
    """What a browser without a network makes of a page in a window of this width."""
    script = """
    <script>onload = () => setTimeout(() => { const d = document.querySelector("iframe").contentDocument;
      const small = [...d.querySelectorAll("main *")].filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX == "visible" && e.clientWidth > 0 && !e.closest("svg"));
      const color = e => getComputedStyle(d.querySelector(e));
      const found = JSON.stringify({
        width: d.documentElement.scrollWidth, images: [...d.images].map(i => i.naturalWidth),
        charts: [...d.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width), small: small.map(e => e.outerHTML.slice(0, 80)),
        faint: color(".faint").color, tick: color("svg text").fill });
      document.body.textContent = `FOUND${found}END`; }, 500)</script>"""
    (folder / "frame.html").write_text(
        f'<body><iframe style="border:0" width={width} height=900 srcdoc="{html.escape(page)}"></iframe>{script}</body>'
    )
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", "--dump-dom", f"file://{folder / 'frame.html'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"FOUND(\{.*\})END", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_it_at_every_width(report, tmp_path, width):
    long = replace(report.mistakes[0], texts={"text": "a" * 500})
    shown = browsed(replace(report, mistakes=(long,)).to_html(), tmp_path, width)
    assert (
        width - 20 < shown["width"] <= width
    )  # beside a scroll bar; nothing to scroll aside but the tables, in frames of their own
    assert shown["small"] == []
    assert shown["images"] == [8]
    assert all(200 < side <= width for side in shown["charts"])
    assert shown["tick"] == shown["faint"]  # charts have the colours of the page
