# SPDX-License-Identifier: Apache-2.0
"""Pushes over real HTTP to a loopback Hub, and what comes back from it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from hfkdq.hub import push_to_hub

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


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "deep/Optimizer.PT", "x.pkl", "last.ckpt"])
def test_pickles_are_refused_before_any_request(hub_server, folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"pickles by their names: {name}\. .*safetensors"):
        push_to_hub(folder, "me/tiny", report=Report())
    assert hub_server.requests == []


@pytest.mark.parametrize("name", ["report.json", "notes.txt", "float/README.md", "recipe.yaml"])
def test_tokens_in_text_are_refused_before_any_request(hub_server, folder, name):
    (folder / name).write_text(f'{{"token": "{FAKE_TOKEN}"}}')
    with pytest.raises(ValueError, match=f"access token in: {name}") as caught:
        push_to_hub(folder, "me/tiny")
    assert FAKE_TOKEN not in str(caught.value)
    assert hub_server.requests == []


def test_a_token_in_the_card_is_refused(hub_server, folder):
    with pytest.raises(ValueError, match=r"access token in: README\.md"):
        push_to_hub(folder, "me/tiny", report=Report(CARD + FAKE_TOKEN))
    assert hub_server.requests == []


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
