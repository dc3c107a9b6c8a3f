#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""How large the files of every precision are, of tiny models and of models of usual width: `docs/results/sizes.md`.

    make bench-sizes

The models have random weights and, where they are of usual width, their family's vocabulary; those with attention have two layers. It fails if a file is larger
than the float file of the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as tf

from benchmarks.models.own import OwnConfig, OwnGRU
from hfkdq.export.backends import load_backend
from hfkdq.export.checks import resolve_task
from hfkdq.export.inputs import made_up
from hfkdq.export.job import ExportJob, plain_copy
from hfkdq.export.precisions import FLOAT, PRECISIONS

PAGE = Path(__file__).parents[1] / "docs" / "results" / "sizes.md"
ORDER = (FLOAT, *(name for name in PRECISIONS if name != FLOAT))


def _text(width: int, vocabulary: int) -> dict[str, Any]:
    return dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=max(2, width // 64),
    )  # fmt: skip


def _models(wide: bool) -> dict[str, Callable[[], tf.PreTrainedModel]]:
    """What makes each model, tiny or of the width that people use."""

    def of(tiny: int, usual: int) -> int:
        return usual if wide else tiny

    width, image = of(32, 768), of(32, 224)
    heads = max(2, width // 64)
    vision = dict(image_size=image, patch_size=of(8, 16))
    gpt2 = dict(vocab_size=of(96, 50257), n_embd=width, n_layer=2, n_head=heads)
    llama = {**_text(of(32, 576), of(96, 49152)), "num_attention_heads": of(2, 9), "num_key_value_heads": of(1, 3)}
    t5 = dict(vocab_size=of(96, 32128), d_model=of(32, 512), d_kv=of(16, 64), d_ff=of(64, 2048), num_heads=of(2, 8))
    speech = dict(**_text(width, 32), conv_dim=[of(16, 512)] * 7, num_conv_pos_embedding_groups=of(2, 16))
    resnet = dict(layer_type="basic", hidden_sizes=[of(8, 64) * 2**i for i in range(4)], depths=[2, 2, 2, 2])
    resnet["embedding_size"] = of(8, 64)
    return {
        "BERT, tied MLM head": lambda: tf.BertForMaskedLM(tf.BertConfig(**_text(width, of(96, 30522)))),
        "T5, tied head": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(**t5, num_layers=2, num_decoder_layers=2, decoder_start_token_id=0)
        ),
        "GPT-2, tied head": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**gpt2)),
        "Llama, tied head": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**llama, tie_word_embeddings=True)),
        "ViT": lambda: tf.ViTForImageClassification(tf.ViTConfig(**_text(width, 0), **vision)),
        "ResNet-18": lambda: tf.ResNetForImageClassification(tf.ResNetConfig(**resnet)),
        "MobileNetV2": lambda: tf.MobileNetV2ForImageClassification(
            tf.MobileNetV2Config(image_size=image, depth_multiplier=of(1, 4) / 4)
        ),
        "Wav2Vec2, CTC": lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**speech)),
        "a GRU of one's own": lambda: OwnGRU(OwnConfig(hidden_size=of(32, 512), vocab_size=of(96, 30522))),
    }


def measure(model: tf.PreTrainedModel) -> dict[str, int]:
    """Bytes of the ONNX files of every precision, by name."""
    backend = load_backend()
    task = resolve_task(backend, model, None)
    batches = made_up(model, backend.dummy_batches(model, task), [])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        job = ExportJob(
            plain_copy(model), backend, task, "onnxruntime", None, None, batches, "made-up inputs", iter(()), None,
            Path(folder),
        )  # fmt: skip
        for name in ORDER:
            with tempfile.TemporaryDirectory(dir=folder) as written:
                job.write_files(PRECISIONS[name], Path(written))
                found[name] = sum(file.stat().st_size for file in Path(written).glob("*.onnx*"))
    return found


def _rows(results: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    yield f"| model | {FLOAT}, kB | {' | '.join(ORDER[1:])} |"
    yield f"|---|{'---:|' * len(ORDER)}"
    for name, found in results.items():
        shares = " | ".join(f"{100 * found[kind] / found[FLOAT]:.1f} %" for kind in ORDER[1:])
        yield f"| {name} | {found[FLOAT] / 1e3:,.0f} | {shares} |"


def page(results: Mapping[str, Mapping[str, Mapping[str, int]]], versions: str) -> str:
    """The page, in Markdown."""
    larger = [
        f"{name} ({size}, {kind})"
        for size, models in results.items()
        for name, found in models.items()
        for kind in ORDER
        if found[kind] > found[FLOAT]
    ]
    told = f"Larger than the float file: {', '.join(larger)}." if larger else "No file is larger than its float file."
    tables = "\n\n".join(f"## {size}\n\n" + "\n".join(_rows(models)) for size, models in results.items())
    return (
        "# How large the files are\n\n"
        "`make bench-sizes` writes this page: the ONNX files of every precision, in percent of the float32 file of the same model, of\n"
        "models with random weights, of two layers where they have attention. What is shared, as the table of an embedding and the head of a language\n"
        "model, is in a file once. int8 ranges are found on made-up inputs, on which no size depends. Dynamic files leave convolutions in floating point.\n\n"
        f"{told} ({versions})\n\n{tables}\n"
    )


def main() -> None:
    """Measures all, or the models that are named, which are then only printed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=__doc__.splitlines()[0])
    parser.add_argument("--models", help="which, by the beginnings of their names, with commas between them")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    chosen = tuple(given.models.split(",")) if given.models else ("",)
    torch.set_num_threads(1)
    results: dict[str, dict[str, dict[str, int]]] = {}
    for size, wide in (("Tiny", False), ("Usual width", True)):
        for name, make in _models(wide).items():
            if name.startswith(chosen):
                torch.manual_seed(0)
                results.setdefault(size, {})[name] = measure(make().eval())
                print(size, name, json.dumps(results[size][name]), flush=True)
    text = page(results, f"transformers {tf.__version__}, torch {torch.__version__.split('+')[0]}")
    if given.models is None:
        given.page.write_text(text)
    print(text)
    sys.exit("Larger than" in text)


if __name__ == "__main__":
    main()
