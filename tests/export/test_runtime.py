# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402

from hfkdq.export.runtime import OnnxSession  # noqa: E402


@pytest.fixture
def path(tmp_path):
    """A file that computes `sum = (input_ids + attention_mask) * 10 + token_type_ids` in int64."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    nodes = [
        helper.make_node("Add", names[:2], ["a"]),
        helper.make_node("Mul", ["a", "ten"], ["b"]),
        helper.make_node("Add", ["b", names[2]], ["sum"]),
    ]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in names],
        [helper.make_tensor_value_info("sum", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor("ten", TensorProto.INT64, [], [10])],
    )
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    return file


def test_names_and_values(path):
    session = OnnxSession(path, threads=1)
    assert session.input_names == ["input_ids", "attention_mask", "token_type_ids"]
    assert session.output_names == ["sum"]
    ones = np.ones((2, 3), dtype=np.int64)
    out = session({"input_ids": 4 * ones, "attention_mask": 0 * ones, "token_type_ids": ones, "labels": ones})
    np.testing.assert_array_equal(out["sum"], 41 * ones)


def test_mask_and_token_types_have_the_defaults_of_transformers(path):
    out = OnnxSession(str(path))({"input_ids": np.array([[4, 5]], dtype=np.int32)})
    np.testing.assert_array_equal(out["sum"], [[50, 60]])


def test_errors_of_onnx_runtime_are_told_in_a_sentence(path, tmp_path):
    with pytest.raises(RuntimeError, match=r"cannot run model.onnx: .*cannot be exported for all sizes"):
        OnnxSession(path)({"input_ids": np.ones((2, 3)).astype(int), "attention_mask": np.ones((2, 4)).astype(int)})
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(RuntimeError, match=r"cannot run broken.onnx: "):
        OnnxSession(tmp_path / "broken.onnx")


def test_bad_input(path, tmp_path):
    session = OnnxSession(path)
    with pytest.raises(ValueError, match="input_ids is missing: got attention_mask"):
        session({"attention_mask": np.ones((1, 2), dtype=np.int64)})
    with pytest.raises(TypeError, match="same_kind"):
        session({"input_ids": np.ones((1, 2), dtype=np.float32)})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        OnnxSession(path, threads=0)
    with pytest.raises(ValueError, match="no ONNX file"):
        OnnxSession(tmp_path / "none.onnx")


def test_needs_neither_torch_nor_transformers():
    program = "import sys, hfkdq.export.runtime; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def one_input(file, kind):
    value = [helper.make_tensor_value_info(name, kind, ["batch", "length"]) for name in ("input_ids", "same")]
    graph = helper.make_graph([helper.make_node("Identity", ["input_ids"], ["same"])], "same", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)
    return file


@pytest.mark.parametrize("kind", [np.float16, np.float64, np.int8])
def test_files_of_others_take_numbers_of_every_kind(tmp_path, kind):
    session = OnnxSession(one_input(tmp_path / "a.onnx", helper.np_dtype_to_tensor_dtype(np.dtype(kind))))
    assert session({"input_ids": np.array([[4, 5]])})["same"].dtype == kind


def test_a_file_that_takes_texts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.onnx takes tensor\(string\) as 'input_ids'"):
        OnnxSession(one_input(tmp_path / "a.onnx", TensorProto.STRING))


def test_a_file_that_does_not_load_is_no_fault_of_the_tracer(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(RuntimeError, match=r"[^.]\. Export it again, or download it again\.$"):
        OnnxSession(tmp_path / "broken.onnx")
