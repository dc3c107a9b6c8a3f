# SPDX-License-Identifier: Apache-2.0
"""What all tests share: no network, how many threads, where the real data sets lie, which tests compare numbers."""

from __future__ import annotations

import functools
import gc
import os
import re
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # test processes share the cores

from pathlib import Path

import datasets
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from transformers import set_seed

from tests import other_processor

other_processor.from_environment()

THREADS = int(os.environ.get("HFKDQ_TEST_THREADS", "1"))  # the models are tiny, and test processes share the cores
# Words of a module whose tests compare numbers; `pytest -m numbers` runs them, as tests/kernels.sh does.
NUMBERS = re.compile(
    r"equal\(|allclose|assert_close|approx\(|assert_array|\.abs\(|hexdigest|losses?\b|logits|launch|export_onnx"
)
IS_5 = not transformers.__version__.startswith("4.")
SAMPLE = 4 if IS_5 else 6
"""Of a test with more cases these many always run, spread evenly, on each line others; the rest runs in `make test-slow`. A file takes
five times as long to write on the v5 line."""
SHARED = {"caching", "losses", "objectives", "pruning", "quantization"}
"""Folders whose tests are shared between the lines, as those marked `one_line` are: most of what they test is alike on both."""
HALVED = {"export", "test_cli", "test_cli_report", "test_compress", "test_examples", "test_report"}
"""Folders and modules of which every other test runs on v5, as they write files; but for those of what this line alone has."""
DATA = Path(os.environ.get("HFKDQ_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def _alone():
    """Every test starts from the same random state, and leaves no mixed precision or compiler to the next one."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    torch.set_num_threads(THREADS)
    datasets.disable_progress_bars()
    set_seed(0)
    yield
    # TrainingArguments set bf16 and torch_compile for the whole process, and accelerate keeps what it once read.
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="module")
def _nothing_old_to_search():
    """A training begins with a search for garbage, which takes seconds among all that earlier tests have imported."""
    gc.collect()
    gc.freeze()


def pytest_configure(config):
    config.addinivalue_line("markers", "numbers: compares numbers, which processors compute in different orders")


@functools.cache
def _compares_numbers(path: Path) -> bool:
    return NUMBERS.search(path.read_text()) is not None


def pytest_collection_modifyitems(items):
    """Tests of modules that compare numbers are marked `numbers`, cases beyond a sample and what takes long on the other line
    `slow`, before `-m` chooses."""
    cases = {}
    for item in items:
        if _compares_numbers(item.path):
            item.add_marker("numbers")
        if os.environ.get("HFKDQ_TEST_CASES") == "all":
            continue
        is_shared = item.get_closest_marker("one_line") or item.path.parent.name in SHARED
        is_halved = IS_5 and HALVED & {item.path.parent.name, item.path.stem} and "exporters" not in item.path.stem
        if (is_shared or is_halved) and zlib.crc32(item.nodeid.encode()) % 2 != IS_5:
            item.add_marker("slow")
        elif not (item.get_closest_marker("every_case") or item.get_closest_marker("slow")):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    offset = 0.5 * IS_5
    for found in cases.values():
        if len(found) > SAMPLE:
            kept = {int((place + offset) * len(found) / SAMPLE) for place in range(SAMPLE)}
            for place, item in enumerate(found):
                if place not in kept:
                    item.add_marker("slow")


def pytest_runtest_setup(item):
    """Tests marked `gpu` skip where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data sets; `HFKDQ_DATA` names another place than `../shared/data`."""
    if not DATA.is_dir():
        pytest.skip(f"no real data sets at {DATA}; set HFKDQ_DATA to their folder")
    return DATA


@pytest.fixture
def training_arguments(tmp_path):
    """Makes plain, quiet `TrainingArguments` that write below `tmp_path`."""
    from transformers import TrainingArguments

    def make(folder: str = "out", cls=TrainingArguments, **kwargs):
        settings = dict(
            output_dir=str(tmp_path / folder), use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
            disable_tqdm=True, learning_rate=1e-3, per_device_train_batch_size=8, seed=0,
        )  # fmt: skip
        return cls(**{**settings, **kwargs})

    return make
