# SPDX-License-Identifier: Apache-2.0
"""One commit to the Hugging Face Hub with everything that `export_onnx` and `CompressionReport` know of a model. Reads
the files of a folder as bytes, and changes no local file."""

from __future__ import annotations

import email.utils
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.hf_api import CommitInfo, RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported there, without __all__
from transformers.utils import logging

from .export.choices import HUB
from .export.record import EXPORT_FACTS, FORMER_NAME, read_export
from .files import sha256_of
from .provenance import ONNX_FOLDER, weight_files
from .report import CompressionReport
from .report.files import check_engine, check_export
from .secrets import redact
from .uploads import Contents, check_secrets, collect

logger = logging.get_logger(__name__)

# The Hub asks for patience with these; nothing has happened then.
_BUSY = (429, 503)
_TRIES = 5
_LONGEST_WAIT = 60.0
# A file beside the record of its export, or in its folder `onnx`.
_FILE = re.compile(r"(onnx/)?[^/\\]*[^/\\.][^/\\]*")
_Answer = TypeVar("_Answer")

_ADVICE = {
    401: "Log in with `hf auth login`, or pass a token with write access as `token`.",
    403: "Pass a token with write access to this repository, push to one of your own, or open a pull request with "
    "create_pr=True.",
    404: "Check `repo_id` and `revision`, and that the token may see them.",
    409: "Someone else committed meanwhile. Push again.",
    412: "Someone else committed meanwhile. Push again.",
    429: "Too many requests. Wait a few minutes and push again.",
}
_ADVICE_SERVER = "The fault is the Hub's. Wait a few minutes and push again."
_ADVICE_REQUEST = "Correct what the answer names and push again."
_ADVICE_CONNECTION = "Check the connection and the variables HF_ENDPOINT and HF_HUB_OFFLINE, and push again."


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    report: CompressionReport | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload compressed model",
    ignore_patterns: list[str] | str | None = None,
    add: bool = False,
) -> CommitInfo:
    """Publishes a compressed model on the Hugging Face Hub in one commit.

    Every file of the folder goes up, hidden ones aside, with the report's model card as `README.md`, its facts as
    `compression_report.json` and its plot as `report.png`. A folder is refused as a whole if it has a file that a model
    repository does not hold (weights are those of safetensors, ONNX and OpenVINO alone), a link that leaves it, or a secret in any file, in
    a name or in the message; or if its exported files are not those of its `export_facts.json`, or of `report`. The repository
    is created where it does not exist. All local checks come before the first request, no local file is written, and a
    push that failed can simply be repeated: what the Hub has already is not sent again. The files of an earlier export that
    the folder has no more go in the same commit, where they are still what their `export_facts.json` says; no other file
    of the repository is touched. Where the Hub asks to wait
    (`Retry-After`, up to a minute), it is asked again, four times at most.

    Args:
        folder (`str` or `os.PathLike`): what [`export_onnx`] wrote: configuration, safetensors checkpoint, exported
            files, tokenizer or processor.
        repo_id (`str`): the repository, `"user/name"`, or `"name"` for one of the token's owner.
        report ([`CompressionReport`], *optional*): what was measured. It takes the place of a `README.md`,
            `compression_report.json` and `report.png` in the folder; without it those are pushed as they are.
        token (`str` or `bool`, *optional*): access token; that of `hf auth login` or `HF_TOKEN` by default.
        private (`bool`, *optional*): whether a repository that this call creates is private. By default it is
            public, unless its organization says otherwise. An existing repository stays what it is.
        revision (`str`, *optional*): branch to commit to, created where it does not exist; `"main"` by default.
        create_pr (`bool`, defaults to `False`): open a pull request with the commit; `revision` must then exist.
        commit_message (`str`, defaults to `"Upload compressed model"`): first line of the commit's message.
        ignore_patterns (`str` or `list[str]`, *optional*): files to leave out, as shell patterns such as `"*.log"` or
            `"runs/*"`, as in `huggingface_hub.upload_folder`.
        add (`bool`, defaults to `False`): keep the precisions that the repository has, and add those of the folder. Both are of
            `export_onnx(layout="hub")` and of one model; beside the files in `onnx/`, their record and what a `report` brings, the
            repository stays as it is. Where it has no export yet, all goes up.

    Returns:
        `huggingface_hub.CommitInfo`: the commit, with its `oid`, `commit_url` and, for a pull request, `pr_url`. As
        a string it is the URL.

    Raises:
        ValueError: no such folder or no `config.json` in it, an invalid `repo_id`, `token`, commit message or card,
            files that are not to be published, a secret in one, or files that the report is not about; with `add`, another
            layout, another model, or a name of a file that another precision has there.
        RuntimeError: the Hub refused (401, 403, 404, 409, 5xx, ...) or could not be reached. The message says what
            to do; the original error is its cause.

    Example:
        ```python
        from hfkdq import export_onnx, push_to_hub

        folder = export_onnx(model, "out/onnx", processing_class=tokenizer)
        commit = push_to_hub(folder, "me/tiny-int8", private=True)
        print(commit.commit_url)
        ```
    """
    folder = Path(folder)
    _check_arguments(folder, repo_id, token, commit_message)
    contents = collect(folder, ignore_patterns)
    if report is not None:
        contents.update(_report_files(report, repo_id))
    check_secrets(folder, contents, [("commit_message", commit_message), ("repo_id", repo_id)])
    _check_files(folder, contents, report)
    own = _record_to_add(folder) if add else {}
    try:
        api = HfApi(token=token, library_name="hfkdq")
        full_id = _patiently(lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            _patiently(lambda: api.create_branch(full_id, branch=str(revision), exist_ok=True))
        parent = None if revision is None else str(revision)
        stale: list[str] = []
        if add:
            contents = _patiently(lambda: _added(api, full_id, parent, own, contents, report is not None))
        else:
            stale = _patiently(lambda: list(_stale_files(api, full_id, parent, folder)))
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in contents.items()]
        changes: list[Any] = [*operations, *(CommitOperationDelete(path_in_repo=name) for name in stale)]
        how: dict[str, Any] = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
        commit: CommitInfo = _patiently(lambda: api.create_commit(full_id, changes, **how))
    except _CannotAdd:
        raise
    # requests, httpx and Xet share no error class below this one, and huggingface_hub lets each of them through.
    except Exception as error:
        raise RuntimeError(_explain(error, folder, repo_id, token)) from error
    gone = f", where {', '.join(stale)} of an earlier push went" if stale else ""
    logger.info(f"Pushed {len(operations)} files of {folder} to {commit.commit_url}{gone}")
    return commit


def check_login() -> None:
    """Asks the Hub whether the token of this machine may push, for whoever pushes only after long work. A Hub that
    cannot be reached now may be later, and is warned of. Raises `ValueError`: there is no token, the Hub does not know
    it or it can only read, or `HF_HUB_OFFLINE` forbids the push."""
    if constants.HF_HUB_OFFLINE:
        raise ValueError("A push is asked for, and HF_HUB_OFFLINE=1 forbids it. Unset it, or leave the push out.")
    if get_token() is None:
        advice = _ADVICE[401].partition(",")[0]
        raise ValueError(f"A push is asked for, and there is no token. {advice}, or set HF_TOKEN.")
    try:
        known = HfApi(library_name="hfkdq").whoami()
    except Exception as error:  # requests and httpx share no error class
        status, answer, _ = _answer(error)
        told = f"A push is asked for, and the Hub refused the token ({status}). {_ADVICE[401]}"
        if status in (401, 403):
            raise ValueError(told) from None
        told = _without_tokens(answer, None)
        logger.warning(f"Whether the token may push is not known, as the Hub could not be asked: {told}.")
        return
    if known.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"A push is asked for, and the token can only read. {_ADVICE[401]}")


def _check_arguments(folder: Path, repo_id: str, token: str | bool | None, commit_message: str) -> None:
    validate_repo_id(repo_id)
    if not repo_id.isprintable():
        raise ValueError(f"repo_id is {repo_id!r}; a Repo id has no line breaks.")
    # What the HTTP libraries would refuse later, with the token in their message.
    if isinstance(token, str) and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ValueError(
            "token is empty or has blanks, line breaks or other characters that no access token has. Copy it again "
            "from https://huggingface.co/settings/tokens, or leave it out after `hf auth login`."
        )
    if not commit_message.strip():
        raise ValueError(f"commit_message is {commit_message!r}; the Hub needs one. Leave it out for the default.")
    if not (folder / "config.json").is_file():
        found = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ValueError(f"{folder} {found}. push_to_hub publishes what export_onnx or save_pretrained wrote.")


def _check_files(folder: Path, contents: Contents, report: CompressionReport | None) -> None:
    """Refuses ONNX files that neither the folder's own report nor `report` is about, and a card that the Hub would not
    read."""
    for place in {(folder / name).parent for name in contents if Path(name).name in (EXPORT_FACTS, FORMER_NAME)}:
        if weight_files(place):
            check_export(place)
    if isinstance(report, CompressionReport):
        check_engine(report, folder)
    if (card := contents.get("README.md")) is not None:
        try:
            ModelCard((card if isinstance(card, bytes) else card.read_bytes()).decode())
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise ValueError(
                f"The metadata on top of README.md is not what the Hub reads: {error} Correct the card in {folder}, or "
                "push a report, which brings its own."
            ) from error


def _stale_files(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> Iterator[str]:
    """The files of an earlier export in the repository that the folder does not have, if nobody has changed them since."""
    listed = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    there = {file.path: file for file in listed if isinstance(file, RepoFile)}
    for record in [PurePosixPath(path) for path in there if PurePosixPath(path).name == EXPORT_FACTS]:
        with tempfile.TemporaryDirectory() as scratch:
            api.hf_hub_download(repo_id, str(record), revision=revision, local_dir=scratch)
            try:
                recorded = read_export(Path(scratch, record.parent)).get("files", {})
            except ValueError:  # which says of no file that it is ours
                continue
            for name, facts in recorded.items():
                path = str(record.parent / name)
                if path not in there or not _FILE.fullmatch(name) or (folder / path).exists():
                    continue
                lfs = there[path].lfs
                known = lfs.sha256 if lfs else sha256_of(
                    api.hf_hub_download(repo_id, path, revision=revision, local_dir=scratch)
                )  # fmt: skip
                if known == facts["sha256"]:
                    yield path
        if not (folder / str(record)).exists():
            yield str(record)


class _CannotAdd(ValueError):
    """What is in the repository does not go with what is to be added."""


def _record_to_add(folder: Path) -> dict[str, Any]:
    own = read_export(folder) if (folder / EXPORT_FACTS).is_file() else {}
    if own.get("layout") != HUB or "precisions" not in own:
        told = f'{folder} is not of export_onnx(layout="hub"), so it cannot be added to others. Export it so.'
        raise _CannotAdd(told)
    return own


def _added(
    api: HfApi, repo_id: str, revision: str | None, own: dict[str, Any], contents: Contents, with_report: bool
) -> Contents:
    """What of `contents` is new in a repository, with the record of all precisions that it then has."""
    if not api.file_exists(repo_id, EXPORT_FACTS, revision=revision):
        return contents
    with tempfile.TemporaryDirectory() as scratch:
        api.hf_hub_download(repo_id, EXPORT_FACTS, revision=revision, local_dir=scratch)
        there = read_export(Path(scratch))
    if there.get("layout") != own["layout"] or "precisions" not in there:
        raise _CannotAdd(f"{repo_id} holds an export of another layout. Push without add=True to replace it.")
    for what, ours, theirs in (
        ("description", own["model"], there.get("model")), ("weights", _checkpoint(own), _checkpoint(there))
    ):  # fmt: skip
        if ours != theirs:
            raise _CannotAdd(
                f"{repo_id} holds the files of another model, by its {what}. Push without add=True to replace them."
            )
    kept = {kind: one for kind, one in there["precisions"].items() if kind not in own["precisions"]}
    taken = {one.get("suffix"): kind for kind, one in kept.items()}
    for kind, one in own["precisions"].items():
        if one.get("suffix") in taken:
            raise _CannotAdd(
                f"In {repo_id} the files of {taken[one['suffix']]} have the names that those of {kind} have in the folder. Export both in "
                "one call, which gives them names of their own, and push that."
            )
    new = {name: facts for name, facts in own["files"].items() if name.startswith(f"{ONNX_FOLDER}/")}
    record = {
        **there, **own["precisions"].get(there.get("kind"), {}), "precisions": {**there["precisions"], **own["precisions"]},
        "files": {**there["files"], **new},
    }  # fmt: skip
    brought = ("README.md", "compression_report.json", "report.png") if with_report else ()
    files = {name: data for name, data in contents.items() if name in new or name in brought}
    return {**files, EXPORT_FACTS: (json.dumps(record, indent=2) + "\n").encode()}


def _checkpoint(record: dict[str, Any]) -> list[str]:
    """The hashes of the weights for PyTorch that a record names."""
    return [facts["sha256"] for name, facts in sorted(record["files"].items()) if name.endswith(".safetensors")]


def _report_files(report: CompressionReport, repo_id: str) -> Contents:
    """Card, facts and plot of a report, rendered without touching the user's folder."""
    shown = {}
    if isinstance(report, CompressionReport):
        _ask_for_unknown(report)
        report = replace(report, mistakes=())  # rows of the data that it was measured on stay here
        shown = {"plot": "report.png"}
    with tempfile.TemporaryDirectory() as scratch:
        plot = Path(scratch) / "report.png"
        report.save_plot(plot)
        return {
            **(_eval_results(report) if isinstance(report, CompressionReport) else {}),
            # A name without its owner is no id that the card's example could load from.
            "README.md": report.to_card(repo_id if "/" in repo_id else None, **shown).encode(),
            "compression_report.json": report.to_json().encode(),
            "report.png": plot.read_bytes(),
        }


def _eval_results(report: CompressionReport) -> Contents:
    """The first metric of the last row as the leaderboard of a benchmark reads it, where the data set is one:
    https://huggingface.co/docs/hub/eval-results."""
    data, engine = report.dataset, report.engines[-1]
    if data is None or data.id is None or data.task_id is None or not engine.metrics:
        return {}
    metric, value = next(iter(engine.metrics.items()))
    place = {"id": data.id, "task_id": data.task_id, **({} if data.revision is None else {"revision": data.revision})}
    notes = f"{metric} of {engine.name}, measured with hfkdq"
    entry = {"dataset": place, "value": round(value, 6), "notes": notes}
    name = re.sub(r"[^\w.-]+", "-", f"{data.id.rpartition('/')[2]}-{data.task_id}").strip("-.")
    return {f".eval_results/{name}.yaml": yaml.safe_dump([entry], sort_keys=False).encode()}


def _ask_for_unknown(report: CompressionReport) -> None:
    """Warns of what people look for in a card and the report does not say."""
    reads_text = report.processor == "AutoTokenizer"
    unknown = {
        "license": report.license, "dataset": report.dataset, "base_model": report.base_model,
        "language": report.language if reads_text else "",
    }  # fmt: skip
    if missing := [f"{name}=" for name, value in unknown.items() if value is None]:
        logger.warning(f"The card does not say {', '.join(missing)}. CompressionReport.measure takes what is known.")


def _patiently(request: Callable[[], _Answer]) -> _Answer:
    """The answer to a request, asked again for as long as the Hub is busy and says so, or for a minute at most."""
    for attempt in range(1, _TRIES):
        try:
            return request()
        except Exception as error:  # requests, httpx and Xet share no error class
            status, _, seconds = _answer(error)
            seconds = float(2 ** (attempt - 1)) if seconds is None else seconds
            if status not in _BUSY or seconds > _LONGEST_WAIT:
                raise
            logger.warning(f"The Hub answered {status}; asking again in {seconds:.0f} s ({attempt} of {_TRIES - 1}).")
            time.sleep(seconds)
    return request()


def _seconds(text: str) -> float | None:
    """The seconds of `Retry-After`, which may be a date."""
    if re.fullmatch(r"\s*\d{1,9}(\.\d{1,9})?\s*", text):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return None
    date = date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())


def _explain(error: BaseException, folder: Path, repo_id: str, token: str | bool | None) -> str:
    """The error message: the answer, the advice, and that no file is lost; never the token."""
    status, answer, seconds = _answer(error)
    if status is None:
        happened, advice = f"{type(error).__name__}: {answer}", _ADVICE_CONNECTION
    else:
        happened = f"the Hub answered {status} ({answer})"
        advice = _ADVICE.get(status, _ADVICE_SERVER if status >= 500 else _ADVICE_REQUEST)
        if status in _BUSY and seconds:
            advice = f"It asks to wait {seconds:.0f} s. {advice}"
    text = f"Could not push {folder} to {repo_id}: {happened}. {advice} The files in {folder} are untouched."
    return _without_tokens(text, token)


def _without_tokens(text: str, token: str | bool | None) -> str:
    for known in (token, get_token()):
        if isinstance(known, str) and known:
            text = text.replace(known, "hf_***")
    return redact(text)


def _answer(error: BaseException | None) -> tuple[int | None, str, float | None]:
    """Status and message of the Hub's answer behind an error and its causes, and the seconds it asks to wait."""
    said, response = "", None
    while error is not None:
        # Not by its truth: in requests a failed response is false.
        response = getattr(error, "response", None)
        # The address is left out: that of a large file carries a signature.
        message = getattr(error, "server_message", None) or str(error).partition(" for url")[0]
        message = " ".join(message.split()).rstrip(".")
        if message not in said:
            said = f"{said}; {message}" if said else message
        error = error.__cause__ if response is None else None
    if response is None:
        return None, said or "no message", None
    return response.status_code, said, _seconds(str(getattr(response, "headers", {}).get("Retry-After") or ""))
