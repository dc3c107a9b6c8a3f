# SPDX-License-Identifier: Apache-2.0
"""Pushes over real HTTP to a loopback Hub, and what comes back from it."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import pickle
import subprocess
import sys
import zipfile
import zlib
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi, constants

from hfkdq.hub import check_login, push_to_hub
from hfkdq.provenance import describe_files, describe_model
from hfkdq.report import CompressionReport, DatasetInfo, Engine

from . import tiny
from .hub_server import BREAK, check_card, loopback_hub  # noqa: F401

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-classification
base_model: me/teacher
tags: [hfkdq, int8]
model-index:
- name: tiny
  results:
  - task: {type: text-classification}
    dataset: {name: words, type: words}
    metrics: [{type: accuracy, value: 0.9}]
---
# Load it from me/tiny
"""
FAKE_TOKEN = "hf_" + "a1B2" * 9


class Report:
    """What push_to_hub asks of a report."""

    def __init__(self, card: str = CARD):
        self.card = card

    def to_card(self, repo_id: str | None = None) -> str:
        return self.card.replace("me/tiny", repo_id or ".")

    def to_json(self) -> str:
        return json.dumps({"accuracy": 0.9})

    def save_plot(self, path: Path) -> Path:
        path.write_bytes(b"\x89PNG fake")
        return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """As export_onnx leaves it: checkpoint, tokenizer, ONNX file, a subfolder; and a hidden file."""
    folder = tmp_path / "export"
    tiny.bert().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "model.onnx").write_bytes(b"onnx" * 100)
    (folder / "report.json").write_text("{}")
    (folder / "float").mkdir()
    (folder / "float" / "model.onnx").write_bytes(b"float onnx" * 100)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "note.json").write_text(FAKE_TOKEN)
    return folder


def snapshot(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def visible(folder: Path) -> dict[str, bytes]:
    names = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".")}


def test_one_commit_holds_folder_and_report(hub_server, folder):
    before = snapshot(folder)
    commit = push_to_hub(folder, "me/tiny", report=Report(), commit_message="First")
    repository = hub_server.repositories["me/tiny"]
    report = {
        "README.md": CARD.encode(),
        "compression_report.json": b'{"accuracy": 0.9}',
        "report.png": b"\x89PNG fake",
    }
    assert repository.files() == {**visible(folder), **report}
    assert "float/model.onnx" in repository.files()
    assert repository.messages == ["First"]
    assert commit.oid == repository.refs["main"]
    assert commit == commit.commit_url == f"{hub_server.url}/me/tiny/commit/{commit.oid}"
    assert snapshot(folder) == before
    uploads = [hashlib.sha256(visible(folder)[name]).hexdigest() for name in ("model.safetensors", "model.onnx")]
    assert set(uploads) <= set(hub_server.large_files)


def test_report_supersedes_the_files_of_the_folder(hub_server, folder):
    (folder / "README.md").write_text(f"old, with a token: {FAKE_TOKEN}")
    (folder / "compression_report.json").write_text("old")
    push_to_hub(folder, "me/tiny", report=Report())
    assert hub_server.repositories["me/tiny"].files()["README.md"] == CARD.encode()
    assert (folder / "compression_report.json").read_text() == "old"


def test_without_report_the_folder_goes_up_as_it_is(hub_server, folder):
    (folder / "README.md").write_text(CARD)
    (folder / "compression_report.json").write_text("{}")
    push_to_hub(folder, "me/tiny")
    assert hub_server.repositories["me/tiny"].files() == visible(folder)


def test_pushing_again_sends_nothing_twice(hub_server, folder):
    first = push_to_hub(folder, "me/tiny", report=Report())
    uploads = hub_server.routes().count("lfs_upload")
    assert push_to_hub(folder, "me/tiny", report=Report()).oid == first.oid
    (folder / "report.json").write_text('{"changed": true}')
    push_to_hub(folder, "me/tiny", report=Report())
    assert hub_server.commits == 2
    assert hub_server.routes().count("lfs_upload") == uploads
    assert hub_server.repositories["me/tiny"].files()["report.json"] == b'{"changed": true}'


def test_private_name_without_owner_and_branch(hub_server, folder):
    push_to_hub(folder, "tiny", private=True, revision="int8")
    repository = hub_server.repositories["me/tiny"]
    assert repository.private
    assert repository.files("main") == {}
    assert repository.files("int8") == visible(folder)
    push_to_hub(folder, "tiny", revision="int8", report=Report())
    assert repository.files("int8")["README.md"] == CARD.replace("me/tiny", ".").encode()


def test_pull_request_leaves_the_branch_alone(hub_server, folder):
    commit = push_to_hub(folder, "me/tiny", create_pr=True)
    repository = hub_server.repositories["me/tiny"]
    assert commit.pr_revision == "refs/pr/1"
    assert repository.files("main") == {}
    assert repository.files("refs/pr/1") == visible(folder)
    push_to_hub(folder, "me/tiny", revision="refs/pr/1", report=Report())
    assert repository.files("refs/pr/1")["README.md"] == CARD.encode()
    with pytest.raises(RuntimeError, match="Check `repo_id` and `revision`"):
        push_to_hub(folder, "me/tiny", revision="nowhere", create_pr=True)
    assert set(repository.refs) == {"main", "refs/pr/1"}


ROUND_TRIP = """
import sys
from pathlib import Path
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from hfkdq.hub import push_to_hub

folder = sys.argv[1]
commit = push_to_hub(folder, "me/tiny")
there = AutoModelForSequenceClassification.from_pretrained("me/tiny", revision=commit.oid)
here = AutoModelForSequenceClassification.from_pretrained(folder)
assert there.state_dict().keys() == here.state_dict().keys()
assert all(torch.equal(there.state_dict()[key], value) for key, value in here.state_dict().items())
ids = AutoTokenizer.from_pretrained("me/tiny", revision=commit.oid)("w1 w2 w3").input_ids
assert ids == AutoTokenizer.from_pretrained(folder)("w1 w2 w3").input_ids
assert there.config.hfkdq == here.config.hfkdq == {"pruning": {"sparsity": 0.5}}
onnx = hf_hub_download("me/tiny", "float/model.onnx", revision=commit.oid)
assert Path(onnx).read_bytes() == (Path(folder) / "float" / "model.onnx").read_bytes()
print(commit.oid)
"""


@pytest.mark.one_line
def test_round_trip_with_from_pretrained(hub_server, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hfkdq": {"pruning": {"sparsity": 0.5}}}))
    script = [sys.executable, "-c", ROUND_TRIP, str(folder)]
    environment = {**hub_server.environment(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == hub_server.repositories["me/tiny"].refs["main"]
    assert hub_server.commits == 1
    assert "resolve" in hub_server.routes()


@pytest.mark.parametrize(
    ("route", "status", "advice"),
    [
        ("create", 401, "hf auth login"),
        ("preupload", 401, "hf auth login"),
        ("create", 403, "write access"),
        ("preupload", 403, "write access"),
        ("lfs_upload", 403, "write access"),
        ("preupload", 404, "Check `repo_id`"),
        ("commit", 409, "Push again"),
        ("commit", 412, "Push again"),
        ("commit", 400, "Correct"),
        ("create", 500, "The fault is the Hub's"),
        ("commit", 500, "The fault is the Hub's"),
        ("create", BREAK, "Check the connection"),
        ("commit", BREAK, "Check the connection"),
    ],
)
def test_a_failed_push_says_what_to_do_and_can_be_repeated(hub_server, folder, route, status, advice):
    before = snapshot(folder)
    hub_server.fail_next(route, status, message=f"the answer to {hub_server.token}", times=5)
    with pytest.raises(RuntimeError, match=advice) as caught:
        push_to_hub(folder, "me/tiny", report=Report(), token=hub_server.token)
    message = str(caught.value)
    assert status == BREAK or (f"the Hub answered {status} (" in message and "the answer to hf_***)" in message)
    assert hub_server.token not in message
    assert f"Could not push {folder} to me/tiny" in message
    assert f"The files in {folder} are untouched." in message
    assert caught.value.__cause__ is not None
    assert hub_server.commits == 0
    assert snapshot(folder) == before

    hub_server.stop_failing()
    push_to_hub(folder, "me/tiny", report=Report(), token=hub_server.token)
    assert hub_server.commits == 1
    assert {**visible(folder), "README.md": CARD.encode()}.items() <= hub_server.repositories[
        "me/tiny"
    ].files().items()


@pytest.mark.parametrize("token", [None, "a-token-of-another-shape"])
def test_a_token_in_an_answer_is_not_repeated(hub_server, folder, token):
    hub_server.fail_next("create", 500, message=f"{hub_server.token} or {token}")
    with pytest.raises(RuntimeError, match=r"500 \(hf_\*\*\* or ") as caught:
        push_to_hub(folder, "me/tiny", token=token)
    assert hub_server.token not in str(caught.value)
    assert token is None or token not in str(caught.value)


def test_a_login_that_cannot_push_is_told_before_there_is_something_to_push(hub_server, monkeypatch, capfd):
    check_login()
    hub_server.role = "read"
    with pytest.raises(ValueError, match="the token can only read"):
        check_login()
    hub_server.fail_next("whoami", BREAK)
    check_login()  # it may be there again when the push is due
    monkeypatch.setenv("HF_TOKEN", FAKE_TOKEN)
    with pytest.raises(ValueError, match=r"the Hub refused the token \(401\)\. Log in with") as caught:
        check_login()
    assert FAKE_TOKEN not in str(caught.value)
    monkeypatch.setattr("hfkdq.hub.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"there is no token\. Log in with `hf auth login`, or set HF_TOKEN"):
        check_login()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE=1 forbids it"):
        check_login()


def test_a_lost_connection_during_an_upload_is_resumed(hub_server, folder):
    hub_server.fail_next("lfs_upload", BREAK)
    push_to_hub(folder, "me/tiny")
    assert hub_server.repositories["me/tiny"].files() == visible(folder)


def test_an_existing_repository_needs_no_right_to_create(hub_server, folder):
    push_to_hub(folder, "me/tiny")
    hub_server.fail_next("create", 403)
    push_to_hub(folder, "me/tiny", report=Report())
    assert hub_server.commits == 2


def test_refusals_of_the_hub_itself(hub_server, folder):
    with pytest.raises(RuntimeError, match="401"):
        push_to_hub(folder, "me/tiny", token=FAKE_TOKEN)
    with pytest.raises(RuntimeError, match="hf auth login"):
        push_to_hub(folder, "me/tiny", token=False)
    with pytest.raises(RuntimeError, match=r"403 \(You don't have the rights .* 'them'\)"):
        push_to_hub(folder, "them/tiny")
    assert hub_server.repositories == {}


@pytest.mark.parametrize(("name", "value"), [("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)])
def test_a_hub_out_of_reach(hub_server, folder, monkeypatch, name, value):
    monkeypatch.setattr(constants, name, value)
    with pytest.raises(RuntimeError, match="Check the connection and the variables HF_ENDPOINT and HF_HUB_OFFLINE"):
        push_to_hub(folder, "me/tiny")
    assert hub_server.requests == []


def test_a_card_that_only_the_hub_refuses(hub_server, folder):
    card = CARD.replace("base_model: me/teacher", "base_model: /home/me/teacher")
    with pytest.raises(RuntimeError, match=r"400 \(Invalid metadata in README\.md\. - \"base_model\" .*/home/me"):
        push_to_hub(folder, "me/tiny", report=Report(card))
    assert hub_server.commits == 0


PICKLE = pickle.dumps({"a": [1, 2, 3], "b": {4, 5}})
PACKED = {
    "pickle of protocol 2": pickle.dumps({"a": [1, 2, 3]}, protocol=2), "pickle": PICKLE,
    "pickle of protocol 0": b"cposix\nsystem\n(S'id'\ntR.", "zip": b"PK\x03\x04" + bytes(40),
    "gzip": gzip.compress(b"x" * 100), "bzip2": bz2.compress(b"x"), "xz": lzma.compress(b"x"), "zlib": zlib.compress(b"x" * 100),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(100), "ELF": b"\x7fELF" + bytes(100), "NumPy": b"\x93NUMPY" + bytes(100),
    "script": b"#!/bin/sh\nid", "SQLite": b"SQLite format 3\0" + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "training_args.bin", "deep/Optimizer.PT", "x.pkl", "last.ckpt", "m.dill", "W.BIN", "a.npy", "a.bin.", "b.pt "],
)  # fmt: skip
def test_pickles_are_refused_before_any_request(hub_server, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(
        ValueError, match=rf"(pickles by their names|called by characters.*): {name}.*safetensors|called"
    ):
        push_to_hub(folder, "me/tiny", report=Report())
    assert hub_server.requests == []


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", ["vocab.txt", "weights.safetensors", "extra.json", "model.onnx_data"])
def test_what_nobody_can_look_into_is_refused_under_any_name(hub_server, folder, kind, name):
    (folder / name).write_bytes(PACKED[kind])
    with pytest.raises(
        ValueError, match=rf"of another kind than their names say.*: {name}\. .*ignore_patterns=\['{name}'\]"
    ):
        push_to_hub(folder, "me/tiny")
    assert hub_server.requests == []


def test_a_zip_behind_other_bytes_is_refused(hub_server, folder):
    with zipfile.ZipFile(folder / "model.onnx_data", "w") as file:
        file.writestr("data.pkl", PICKLE)
    (folder / "model.onnx_data").write_bytes(bytes(5000) + (folder / "model.onnx_data").read_bytes())
    with pytest.raises(ValueError, match=r"of another kind than their names say.*model\.onnx_data"):
        push_to_hub(folder, "me/tiny")


def test_a_safetensors_header_that_looks_like_a_pickle_passes(hub_server, folder):
    header = json.dumps({"__metadata__": {"note": ""}}).encode()
    header = header[:-3] + b" " * (0x0280 - len(header)) + header[-3:]
    (folder / "extra.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert (folder / "extra.safetensors").read_bytes().startswith(b"\x80\x02")
    push_to_hub(folder, "me/tiny")


@pytest.mark.parametrize(
    "name",
    ["train.log", "run.sh", "nb.ipynb", "page.html", "notes", "data.csv", "m.h5", "a.gguf", "x.JSON.gz", "vocab.dat", "events.out.1", "x.json ",
     "setup.py", "a\nb.json", "model.onnx.exe", "modèle.exe", "x\uff0ebin"],
)  # fmt: skip
def test_what_no_model_repository_holds_is_refused_or_left_out(hub_server, folder, name):
    (folder / name).write_text("x")
    with pytest.raises(ValueError, match="was not pushed") as caught:
        push_to_hub(folder, "me/tiny")
    message = str(caught.value)
    assert name.strip() in message or repr(name) in message
    assert "\n" not in message
    assert hub_server.requests == []
    push_to_hub(folder, "me/tiny", ignore_patterns=[name])
    assert set(hub_server.repositories["me/tiny"].files()) == set(visible(folder)) - {name}


def test_one_error_names_everything_and_patterns_leave_it_out(hub_server, folder, tmp_path):
    (folder / "runs").mkdir()
    for name in ("train.log", "runs/events.1", "x.pkl"):
        (folder / name).write_bytes(b"x")
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="was not pushed") as caught:
        push_to_hub(folder, "me/tiny")
    assert all(name in str(caught.value) for name in ("train.log", "runs/events.1", "x.pkl", "linked"))
    push_to_hub(folder, "me/tiny", ignore_patterns=["*.log", "runs/*", "*.pkl", "linked/"])
    pushed = set(hub_server.repositories["me/tiny"].files())
    assert pushed == {n for n in visible(folder) if not n.startswith(("train", "runs", "x.", "linked"))}


def test_very_many_files_are_named_in_part(hub_server, folder):
    for number in range(1000):
        (folder / f"{number}.log").write_text("x")
    with pytest.raises(ValueError, match="and 950 more") as caught:
        push_to_hub(folder, "me/tiny")
    assert len(str(caught.value)) < 3000


def test_what_a_model_repository_holds_passes(hub_server, folder):
    names = ["LICENSE", "LICENSE.txt", "NOTICE", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model.v3", "merges.txt", "source.spm",
             "chat_template.jinja", "additional_chat_templates/tool.jinja", "bpe.codes", "qwen.tiktoken", "picture.png", "images/a.JPG",
             "model_quantized.onnx", "model.onnx.data", "model.onnx_data", "model.onnx_data_1", "decoder.onnx", "trainer_state.json",
             "modeling_own.py", "recipe.yaml", "modèle.json"]  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"text")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_own.Own"}}))
    push_to_hub(folder, "me/tiny")
    assert set(names) <= set(hub_server.repositories["me/tiny"].files())


def test_links_stay_inside(hub_server, folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_text("{}")
    (outside / "back").symlink_to(folder / "config.json")
    (folder / "same.json").symlink_to("config.json")
    (folder / "float" / "up.json").symlink_to("../same.json")
    push_to_hub(folder, "me/tiny")
    assert hub_server.repositories["me/tiny"].files()["float/up.json"] == (folder / "config.json").read_bytes()
    links = {
        "out.json": outside / "secret.json", "hidden.json": folder / ".cache" / "note.json", "broken.json": "nowhere.json", "loop.json": "loop.json",
        "chain.json": "out.json", "through.json": outside / "back", "directory": outside, "inner": folder / "float", "up": "..",
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
        if name == "chain.json":
            (folder / "out.json").symlink_to(links["out.json"])
        with pytest.raises(ValueError, match=rf"links to what is not in the folder.*{name}"):
            push_to_hub(folder, "me/tiny")
        for made in {name, "out.json"}:
            (folder / made).unlink(missing_ok=True)
    (tmp_path / "link").symlink_to(folder)
    push_to_hub(tmp_path / "link", "me/tiny")


def test_pipes_and_files_that_cannot_be_read_are_refused_without_waiting(hub_server, folder, monkeypatch):
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(ValueError, match=r"no files \(pipes.*pipe\.json"):
        push_to_hub(folder, "me/tiny")
    (folder / "pipe.json").unlink()
    read = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "merges.txt":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)

    (folder / "merges.txt").write_text("x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"not readable: merges\.txt \(Permission denied\)"):
        push_to_hub(folder, "me/tiny")


@pytest.mark.parametrize(
    "name", ["report.json", "notes.txt", "float/README.md", "recipe.yaml", "model.onnx", "more.safetensors", "a.png"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32-be"])
def test_secrets_are_refused_in_every_file_before_any_request(hub_server, folder, name, encoding):
    (folder / name).write_bytes(b"\x08\x01" * 8 + f'{{"token": "{FAKE_TOKEN}"}}'.encode(encoding))
    with pytest.raises(ValueError, match=f"access token in: {name}") as caught:
        push_to_hub(folder, "me/tiny")
    assert FAKE_TOKEN not in str(caught.value)
    assert hub_server.requests == []
    push_to_hub(folder, "me/tiny", ignore_patterns=[name])


def test_secrets_are_refused_in_names_messages_and_cards(hub_server, folder):
    for arguments in (dict(commit_message=f"with {FAKE_TOKEN}"), dict(report=Report(CARD + FAKE_TOKEN))):
        with pytest.raises(ValueError, match=r"access token in: (commit_message|README\.md)") as caught:
            push_to_hub(folder, "me/tiny", **arguments)
        assert FAKE_TOKEN not in str(caught.value)
    (folder / f"{FAKE_TOKEN}.json").write_text("{}")
    with pytest.raises(ValueError, match=r"access token in: the name of hf_\*\*\*") as caught:
        push_to_hub(folder, "me/tiny")
    assert FAKE_TOKEN not in str(caught.value)
    assert hub_server.requests == []


# ------------------------------------------------------------------ reports and files


def exported(folder: Path) -> None:
    facts = {"kind": "int8", "files": describe_files(folder), "model": describe_model(tiny.bert())}
    (folder / "report.json").write_text(json.dumps(facts))


def measured(folder: Path) -> CompressionReport:
    engine = Engine(name="ONNX", kind="onnx", metrics={"accuracy": 0.5}, size=400, files=describe_files(folder))
    return CompressionReport(engines=(engine,), architecture="BertForSequenceClassification", samples=4)


def test_what_a_card_should_say_and_does_not_is_asked_for(hub_server, folder, caplog):
    report = replace(measured(folder), processor="AutoTokenizer", license="mit")
    push_to_hub(folder, "me/tiny", report=report)
    assert "The card does not say dataset=, base_model=, language=." in caplog.text
    card = hub_server.repositories["me/tiny"].files()["README.md"].decode()
    assert "![Quality, size and latency of every row](report.png)" in card


def test_the_result_on_a_benchmark_goes_where_its_leaderboard_looks(hub_server, folder):
    data = DatasetInfo(name="GPQA", id="Idavidrein/gpqa", task_id="gpqa_diamond", revision="a" * 40)
    push_to_hub(folder, "me/tiny", report=replace(measured(folder), dataset=data))
    files = hub_server.repositories["me/tiny"].files()
    (entry,) = yaml.safe_load(files[".eval_results/gpqa-gpqa_diamond.yaml"])
    assert entry["dataset"] == {"id": data.id, "task_id": data.task_id, "revision": data.revision}
    assert entry["value"] == 0.5
    if parse := getattr(huggingface_hub, "parse_eval_result_entries", None):  # of huggingface_hub 1 and later
        assert (parse([entry])[0].task_id, parse([entry])[0].value) == ("gpqa_diamond", 0.5)
    push_to_hub(folder, "me/other", report=replace(measured(folder), dataset=replace(data, task_id=None)))
    assert not any(".eval_results" in name for name in hub_server.repositories["me/other"].files())


def test_files_that_the_reports_are_about_pass(hub_server, folder):
    exported(folder)
    push_to_hub(folder, "me/tiny", report=measured(folder))
    assert hub_server.commits == 1


def test_files_of_an_earlier_export_go_with_the_next_push(hub_server, folder):
    """And nothing that another hand has written or changed."""
    large, small = [folder / "model.onnx_data", folder / "encoder_model.onnx"], folder / "model.onnx.data"
    for file in (*large, small):
        file.write_bytes(file.name.encode())
    facts = {"kind": "int8", "files": describe_files(folder), "model": describe_model(tiny.bert())}
    facts["files"]["../theirs.txt"] = facts["files"]["theirs.txt"] = facts["files"]["model.onnx_data"]
    (folder / "theirs.txt").write_text("a file of the owner's")
    (folder / "report.json").unlink()
    (folder / "export_facts.json").write_text(json.dumps(facts))
    own = {"export_facts.json": None, "theirs.txt": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfkdq.hub._check_files", lambda *_: None)  # no record of ours names what was never there
        push_to_hub(folder, "me/tiny")
    repository = hub_server.repositories["me/tiny"]
    repository.files()["encoder_model.onnx"] = b"changed by its owner"
    for name in ("model.onnx_data", "encoder_model.onnx", "model.onnx.data", "theirs.txt", "export_facts.json"):
        (folder / name).unlink()
    exported(folder)
    push_to_hub(folder, "me/tiny", ignore_patterns="model.safetensors")
    gone = {"model.onnx_data", "model.onnx.data", "export_facts.json"}
    assert repository.files().keys() == visible(folder).keys() | {"encoder_model.onnx", *own} - gone
    assert hub_server.commits == 2
    push_to_hub(folder, "me/tiny", create_pr=True, commit_message="Nothing to delete")
    assert hub_server.commits == 2


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_files_of_another_export_are_refused(hub_server, folder, name):
    report = measured(folder)
    exported(folder)
    (folder / name).write_bytes((folder / name).read_bytes() + b"x")
    with pytest.raises(ValueError, match=rf"does not hold what its report\.json is about: {name} has changed"):
        push_to_hub(folder, "me/tiny")
    exported(folder)
    with pytest.raises(ValueError, match=rf"is not what the report measured as 'ONNX': {name} has changed"):
        push_to_hub(folder, "me/tiny", report=report)
    (folder / "model.onnx_data").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model\.onnx_data is not one of the files"):
        push_to_hub(folder, "me/tiny")
    assert hub_server.requests == []


def test_a_damaged_report_in_the_folder_is_refused(hub_server, folder):
    (folder / "report.json").write_text('{"kind": ')
    with pytest.raises(ValueError, match=r"report\.json is "):
        push_to_hub(folder, "me/tiny")


# ------------------------------------------------------------------ patience


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """How long was waited, without waiting."""
    waits = []
    monkeypatch.setattr("hfkdq.hub.time.sleep", waits.append)
    return waits


@pytest.mark.parametrize("route", ["create", "branch", "preupload", "commit"])
@pytest.mark.parametrize("status", [429, 503])
def test_the_hub_is_asked_again_when_it_says(hub_server, folder, slept, route, status):
    hub_server.fail_next(route, status, times=2, headers={"Retry-After": "7"})
    push_to_hub(folder, "me/tiny", revision="int8")
    assert len(slept) == 2
    assert all(
        7.0 <= seconds <= 8.0 for seconds in slept
    )  # some requests huggingface_hub repeats itself, a second later
    assert hub_server.commits == 1


def test_patience_takes_dates_and_has_an_end(hub_server, folder, slept):
    later = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    hub_server.fail_next("commit", 429, headers={"Retry-After": later})
    push_to_hub(folder, "me/tiny")
    assert 25 < slept.pop() <= 30
    for header, waits in (
        ({}, [1.0, 2.0, 4.0, 8.0]),
        ({"Retry-After": "3600"}, []),
        ({"Retry-After": "-1"}, [1.0, 2.0, 4.0, 8.0]),
    ):
        hub_server.fail_next("commit", 429, times=5, headers=header)
        (folder / "report.json").write_text(json.dumps({"turn": str(header)}))
        with pytest.raises(RuntimeError, match="Wait a few minutes"):
            push_to_hub(folder, "me/tiny")
        assert slept == waits
        slept.clear()
        hub_server.stop_failing()


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: [unclosed\n---\n",
        "---\njust text\n---\n",
        "---\nmodel-index: [{name: tiny, results: [{task: 1}]}]\n---\n",
    ],
)
def test_an_unreadable_card_is_refused_before_any_request(hub_server, folder, card):
    with pytest.raises(ValueError, match="metadata on top of README"):
        push_to_hub(folder, "me/tiny", report=Report(card))
    assert hub_server.requests == []


def test_bad_arguments_are_refused_before_any_request(hub_server, folder, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        push_to_hub(tmp_path / "nowhere", "me/tiny")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        push_to_hub(folder / "float", "me/tiny")
    with pytest.raises(ValueError, match="commit_message"):
        push_to_hub(folder, "me/tiny", commit_message=" ")
    with pytest.raises(ValueError, match="Repo id"):
        push_to_hub(folder, "me/tiny/int8")
    with pytest.raises(ValueError, match="line breaks") as caught:
        push_to_hub(folder, "me/tiny", token=f"{FAKE_TOKEN}\n")
    assert FAKE_TOKEN not in str(caught.value)
    assert hub_server.requests == []


def test_the_server_validates_cards():
    assert check_card(CARD) == ([], [])
    assert check_card("no metadata")[1]
    for wrong in ("license: All rights reserved", "tags: int8", "datasets: [/data/words]", "pipeline_tag: Some Task"):
        assert check_card(f"---\n{wrong}\n---\n")[0], wrong


def test_the_server_lists_files_and_guards_private_repositories(hub_server, folder):
    push_to_hub(folder, "me/tiny", private=True)
    api = HfApi()
    assert set(api.list_repo_files("me/tiny")) == set(visible(folder))
    assert {entry.path for entry in api.list_repo_tree("me/tiny", "float")} == {"float/model.onnx"}
    with pytest.raises(OSError, match="401"):
        HfApi(token=False).model_info("me/tiny")
    with pytest.raises(ValueError, match="no route 'upload'"):
        hub_server.fail_next("upload", 500)
