# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import transformers

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("5"), reason="the demo exports through Optimum, which needs the optimum line"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    from hfkdq.demo import TINY, run_demo

    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run_demo(folder, size=TINY)


def test_it_writes_what_it_names(demo):
    folder, report = demo
    assert [engine.name for engine in report.engines] == ["teacher", "student", "ONNX float", "ONNX int8"]
    for name in ("README.md", "report.json", "report.png", "onnx-int8/model.onnx", "onnx-float/model.onnx", "teacher"):
        assert (folder / name).exists(), name
    config = json.loads((folder / "onnx-int8" / "config.json").read_text())
    assert set(config["hfkdq"]) == {"student", "distillation", "pruning", "quantization"}
    assert config["intermediate_size"] == 64  # half of the teacher's 128
    assert config["num_hidden_layers"] == 1


def test_the_result_classifies_images_in_a_pipeline(demo):
    from optimum.onnxruntime import ORTModelForImageClassification
    from PIL import Image
    from transformers import AutoModelForImageClassification, ViTImageProcessor, pipeline

    folder = demo[0] / "onnx-int8"
    processor = ViTImageProcessor.from_pretrained(folder)
    classify = pipeline(
        "image-classification", model=ORTModelForImageClassification.from_pretrained(folder), image_processor=processor
    )
    answers = classify(Image.new("RGB", (8, 8)))
    assert {answer["label"] for answer in answers} <= {str(digit) for digit in range(10)}
    assert AutoModelForImageClassification.from_pretrained(folder).config.intermediate_size == 64


def test_an_earlier_result_is_replaced_only_on_request(demo, tmp_path):
    from hfkdq.demo import _free

    with pytest.raises(FileExistsError, match="--overwrite"):
        _free(demo[0], overwrite=False)
    (tmp_path / "onnx-int8").mkdir()
    (tmp_path / "mine.txt").write_text("keep")
    _free(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
