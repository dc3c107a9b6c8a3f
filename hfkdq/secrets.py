# SPDX-License-Identifier: Apache-2.0
"""What access tokens, keys and passwords look like, in files, texts and environments."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

_CHUNK = 1 << 24
# More than the longest match in UTF-32, so that what lies across two chunks is whole in one of them.
_OVERLAP = 1 << 13
# In weights hardly any 16 bytes in a row are text, and hardly any secret with what names it is shorter.
_RUN = 16
_SMALL = 1 << 16
_TEXT = bytes(1 if 32 <= code < 127 or code in (9, 10, 13) else 2 * (code == 0) for code in range(256))
# How letters and zero bytes follow one another in UTF-16 and in UTF-32.
_WIDE = ((re.compile(rb"\x01(?:\x02\x01)*"), b"\1\2" * 6), (re.compile(rb"\x01(?:\x02{3}\x01)*"), b"\1\2\2\2" * 6))
_NO_TEXT = re.compile(rb"[^\x01]")
_ESCAPE = re.compile(rb"\\+u00([2-7][0-9A-Fa-f])")
_ENCODED = re.compile(rb"[A-Za-z0-9+/_=-]{64}")
# What may stand before a secret that is short enough to be a part of a word: escapes such as \\n in JSON and %3D in an
# address too.
_BEFORE = re.compile(r"(?:^|[^A-Za-z0-9]|\\[nrtbf]|\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}|%[0-9A-Fa-f]{2})$")


@dataclass(frozen=True)
class _Shape:
    """A kind of secret: texts without which there is none, and its pattern, whose group `keep` is no secret."""

    kind: str
    anchors: tuple[bytes, ...]
    is_word: bool
    in_text: re.Pattern[str]
    in_bytes: re.Pattern[bytes]


# Kind, texts of which one must occur, whether it begins a word, pattern.
_OWN: tuple[tuple[str, tuple[str, ...], bool, str], ...] = (
    ("Hugging Face access token", ("hf_",), False, r"(?P<keep>hf_)(?:(?=[A-Za-z]*[0-9])[A-Za-z0-9]{20,}|[A-Za-z]{30,})"),
    ("Hugging Face access token", ("api_org_",), False, r"(?P<keep>api_org_)[A-Za-z0-9]{20,}"),
    ("Hugging Face access token", ("hf_oauth_",), False, r"(?P<keep>hf_oauth_)[A-Za-z0-9_.-]{20,}"),
    ("Hugging Face access token", ("hf_jwt_",), False, r"(?P<keep>hf_jwt_)[A-Za-z0-9_.-]{20,}"),
    ("GitHub token", ("github_pat_",), False, r"(?P<keep>github_pat_)[A-Za-z0-9_]{30,}"),
    ("GitHub token", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), False, r"(?P<keep>gh[pousr]_)[A-Za-z0-9]{36,}"),
    ("GitLab token", ("glpat-",), False, r"(?P<keep>glpat-)[A-Za-z0-9_-]{20,}"),
    ("Anthropic API key", ("sk-ant-",), False, r"(?P<keep>sk-ant-)[A-Za-z0-9_-]{20,}"),
    ("OpenAI API key", ("sk-",), True, r"(?P<keep>sk-)(?:(?:proj|svcacct|admin|None|or-v1)-[A-Za-z0-9_-]{20,}|[A-Za-z0-9]{32,})"),
    ("Google API key", ("AIza",), False, r"(?P<keep>AIza)[A-Za-z0-9_-]{35}"),
    ("Google OAuth secret", ("GOCSPX-",), False, r"(?P<keep>GOCSPX-)[A-Za-z0-9_-]{20,}"),
    ("Google OAuth token", ("ya29.",), True, r"(?P<keep>ya29\.)[A-Za-z0-9_-]{20,}"),
    ("Google OAuth token", ("1//0",), True, r"(?P<keep>1//0)[A-Za-z0-9_-]{38,}"),
    ("Slack token", ("xox",), False, r"(?P<keep>xox[a-z](?:\.xox[a-z])?-)[A-Za-z0-9-]{10,}"),
    ("Slack token", ("xapp-",), False, r"(?P<keep>xapp-)[0-9]-[A-Za-z0-9-]{20,}"),
    ("Stripe key", ("k_live_", "k_test_"), False, r"(?P<keep>[srp]k_(?:live|test)_)[A-Za-z0-9]{16,}"),
    ("Stripe key", ("whsec_",), False, r"(?P<keep>whsec_)[A-Za-z0-9+/]{24,}"),
    ("npm token", ("npm_",), False, r"(?P<keep>npm_)[A-Za-z0-9]{36}"),
    ("npm token", ("_authToken",), False, r"(?P<keep>_authToken\s{0,4}=\s{0,4})[^\s\"'${}]{8,}"),
    ("PyPI token", ("pypi-AgE",), False, r"(?P<keep>pypi-)AgE[A-Za-z0-9_-]{50,}"),
    ("AWS secret key", ("ecret_access_key", "ECRET_ACCESS_KEY", "ecretAccessKey", "SecretKey"), False,
     r"(?P<keep>(?i:secret_?(?:access_?)?key)[\"']?\s{0,4}[:=]\s{0,4}[\"']?)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])"),
    ("Azure storage key", ("AccountKey=",), False, r"(?P<keep>AccountKey=)[A-Za-z0-9+/]{60,}={0,2}"),
    ("Azure access key", ("SharedAccessKey=",), False, r"(?P<keep>SharedAccessKey=)[A-Za-z0-9+/]{40,}={0,2}"),
    ("signed address", ("sig=", "X-Amz-Signature=", "X-Goog-Signature="), False,
     r"(?P<keep>[?&](?:sig|X-Amz-Signature|X-Goog-Signature)=)[A-Za-z0-9+/%]{40,}={0,2}"),
    ("private key", ("PRIVATE KEY",), False,
     r"-----BEGIN (?:[A-Z0-9]{2,9} ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:[^-]{1,20000}-----END [A-Z0-9 ]{1,40}-----)?"),
    ("private key", ("PuTTY-User-Key-File-",), False, r"PuTTY-User-Key-File-[0-9]"),
    ("private key", ("AGE-SECRET-KEY-1",), False, r"(?P<keep>AGE-SECRET-KEY-1)[A-Z0-9]{40,}"),
    ("JSON Web Token", ("eyJ",), False, r"(?P<keep>eyJ)[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    ("Neptune API token", ("eyJhcGlf",), False, r"(?P<keep>eyJ)hcGlf[A-Za-z0-9_=+/-]{60,}"),
    ("Weights & Biases API key", ("andb", "ANDB"), False,
     r"(?P<keep>(?i:wandb)[^\n]{0,60}?(?i:key|password|login)[^A-Za-z0-9\n]{1,12}(?:local-)?)[0-9a-f]{40}(?![0-9A-Za-z])"),
    ("Weights & Biases API key", ("api.wandb.ai",), False,
     r"(?P<keep>api\.wandb\.ai\s{1,9}login\s{1,9}\w{1,40}\s{1,9}password\s{1,9})[^\s\"']{20,}"),
    ("Weights & Biases API key", ("wandb_v1_",), False, r"(?P<keep>wandb_v1_)[A-Za-z0-9_]{30,}"),
    ("Kaggle key", ('"key"', "KAGGLE_KEY"), False,
     r"(?P<keep>(?:\"username\"\s{0,9}:\s{0,9}\"[^\"\n]{1,60}\"\s{0,9},\s{0,9}\"key\"\s{0,9}:\s{0,9}\"|KAGGLE_KEY[\"']?\s{0,4}[:=]\s{0,4}[\"']?))[0-9a-f]{32}(?![0-9A-Za-z])"),
    ("Replicate token", ("r8_",), True, r"(?P<keep>r8_)[A-Za-z0-9]{30,}"),
    ("Telegram bot token", (":",), True,
     r"(?<![0-9:])[0-9]{6,10}:(?=[\w-]{0,34}[a-z])(?=[\w-]{0,34}[A-Z])(?=[\w-]{0,34}[0-9])[0-9A-Za-z_-]{35}(?![\w-])"),
    ("Discord address", ("/api/webhooks/",), False, r"(?P<keep>discord(?:app)?\.com/api/webhooks/)[0-9]{10,}/[\w-]{40,}"),
    ("SendGrid API key", ("SG.",), True, r"(?P<keep>SG\.)[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
    ("Databricks token", ("dapi",), True, r"(?P<keep>dapi)[0-9a-f]{32}(?![0-9A-Za-z])"),
    ("Groq API key", ("gsk_",), False, r"(?P<keep>gsk_)[A-Za-z0-9]{40,}"),
    ("xAI API key", ("xai-",), True, r"(?P<keep>xai-)[A-Za-z0-9]{60,}"),
    ("Perplexity API key", ("pplx-",), False, r"(?P<keep>pplx-)[A-Za-z0-9]{40,}"),
    ("NVIDIA API key", ("nvapi-",), False, r"(?P<keep>nvapi-)[A-Za-z0-9_-]{40,}"),
    ("Docker token", ("dckr_pat_",), False, r"(?P<keep>dckr_pat_)[A-Za-z0-9_-]{20,}"),
    ("DigitalOcean token", ("_v1_",), False, r"(?P<keep>do[opr]_v1_)[0-9a-f]{64}"),
    ("Shopify token", ("shpat_", "shpca_", "shppa_", "shpss_"), False, r"(?P<keep>shp(?:at|ca|pa|ss)_)[0-9a-fA-F]{32}"),
    ("Vault token", ("hvs.",), True, r"(?P<keep>hvs\.)[A-Za-z0-9_-]{24,}"),
    ("Grafana token", ("glsa_",), False, r"(?P<keep>glsa_)[A-Za-z0-9]{32}_[0-9a-fA-F]{8}"),
    ("Notion token", ("ntn_",), True, r"(?P<keep>ntn_)[A-Za-z0-9]{40,}"),
    ("Linear API key", ("lin_api_",), False, r"(?P<keep>lin_api_)[A-Za-z0-9]{40,}"),
    ("Mailgun key", ("key-",), True, r"(?P<keep>key-)[0-9a-f]{32}(?![0-9A-Za-z])"),
    ("Authorization header", ("earer ", "EARER "), False,
     r"(?P<keep>(?i:authorization)[\"']?\s{0,4}[:=]\s{0,4}[\"']?(?i:bearer) )[A-Za-z0-9_.~+/-]{16,}"),
    ("address with a password", ("://",), False,
     r"(?P<keep>://)[^\s:/?#\[\]@{}<>\"'`\\|^\x00-\x20\x7f-\xff]{0,80}:"
     r"(?!\*+@)[^\s:/?#\[\]@{}<>\"'`\\|^\x00-\x20\x7f-\xff]{1,120}(?=@[A-Za-z0-9\[])"),
)  # fmt: skip
# Of the library detect-secrets: kind, module, class, texts of which one must occur, whether it begins a word.
_LIBRARY: tuple[tuple[str, str, str, tuple[str, ...], bool], ...] = (
    ("AWS access key", "aws", "AWSKeyDetector", ("A3T", "ABIA", "ACCA", "AKIA", "ASIA"), True),
    ("Azure storage key", "azure_storage_key", "AzureStorageKeyDetector", ("AccountKey=",), False),
    ("Discord bot token", "discord", "DiscordBotTokenDetector", (".",), False),
    ("GitLab token", "gitlab_token", "GitLabTokenDetector", ("gl", "GR1348941"), True),
    ("Mailchimp key", "mailchimp", "MailchimpDetector", ("-us",), True),
    ("npm token", "npm", "NpmDetector", ("_authToken=",), False),
    ("OpenAI API key", "openai", "OpenAIDetector", ("T3BlbkFJ",), False),
    ("private key", "private_key", "PrivateKeyDetector", ("PRIVATE KEY", "PuTTY-User-Key-File-2"), False),
    ("PyPI token", "pypi_token", "PypiTokenDetector", ("pypi-AgE",), False),
    ("SendGrid API key", "sendgrid", "SendGridDetector", ("SG.",), True),
    ("Slack token", "slack", "SlackDetector", ("xox", "hooks.slack.com"), False),
    ("Square secret", "square_oauth", "SquareOAuthDetector", ("sq0csp-",), False),
    ("Stripe key", "stripe", "StripeDetector", ("k_live_",), False),
    ("Twilio key", "twilio", "TwilioKeyDetector", ("AC", "SK"), True),
)
_NAMES = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|API_?KEYS?|ACCESS_?KEY|CREDENTIAL|PRIVATE_?KEY|COOKIE|BEARER|OAUTH"
    r"|AUTH(?!OR(?!IZ))|(?:^|_)(?:PASS|PAT|PIN|DSN|JWT|KEY|CREDS?)(?:_|$)|(?:^|_)SAS(?:_|$)|_PWD$",
    re.IGNORECASE,
)
_INNOCENT = frozenset({"PWD", "OLDPWD"})


def find_secrets(data: bytes) -> list[str]:
    """The kinds of secrets in `data`, the content of a file or a part of it, such as `"GitHub token"`, in text of any
    encoding or among other bytes: sorted, each once."""
    views = [_text_of(data)]
    if b"\0" in data:
        views.append(_wide_text_of(data))
    found: set[str] = set()
    for view in views:
        found |= _kinds_in(view)
        if b"\\u00" in view:
            found |= _kinds_in(_ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode()), view))
    return sorted(found)


def find_secrets_in_file(path: str | os.PathLike[str]) -> list[str]:
    """What [`find_secrets`] finds in a file, which is read in pieces."""
    found: set[str] = set()
    for chunk in _chunks(Path(path)):
        found.update(find_secrets(chunk))
    return sorted(found)


def redact(text: str) -> str:
    """`text` with `***` in place of every secret in it; what tells its kind, such as `hf_`, stays."""
    for shape in _shapes():
        if any(anchor.decode() in text for anchor in shape.anchors):
            text = shape.in_text.sub(partial(_hidden, shape), text)
    return text


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that needs no secrets: without the variables that hold one by name or by value."""
    texts = {name: f"{name}={value}".encode(errors="backslashreplace") for name, value in environ.items()}
    return {n: environ[n] for n, t in texts.items() if n in _INNOCENT or not (_NAMES.search(n) or find_secrets(t))}


def _hidden(shape: _Shape, match: re.Match[str]) -> str:
    if shape.is_word and not _BEFORE.search(match.string[max(0, match.start() - 6) : match.start()]):
        return match[0]
    kept = match.groupdict().get("keep")
    return f"{kept}***" if kept else "***"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        before = b""
        while piece := file.read(_CHUNK):
            yield before + piece
            before = (before + piece)[-_OVERLAP:]


def _text_of(data: bytes) -> bytes:
    """The stretches of text in `data`, with a zero byte between them."""
    if len(data) <= _SMALL:
        return data
    marks, runs, position = data.translate(_TEXT), [], 0
    while (start := marks.find(b"\1" * _RUN, position)) >= 0:
        end = _NO_TEXT.search(marks, start)
        position = end.start() if end else len(data)
        runs.append(data[start:position])
    return b"\0".join(runs)


def _wide_text_of(data: bytes) -> bytes:
    """The stretches of text in UTF-16 and UTF-32, in one byte a letter, with a zero byte between them."""
    marks, runs = data.translate(_TEXT), []
    for pattern, beginning in _WIDE:
        position = 0
        while (start := marks.find(beginning, position)) >= 0:
            match = pattern.match(marks, start)
            position = match.end() if match else start + 1
            runs.append(data[start:position].replace(b"\0", b""))
    return b"\0".join(runs)


def _kinds_in(text: bytes) -> set[str]:
    shapes = [shape for shape in _shapes() if any(anchor in text for anchor in shape.anchors)]
    return {each.kind for each in shapes if any(_counts(each, text, match) for match in each.in_bytes.finditer(text))}


def _counts(shape: _Shape, text: bytes, match: re.Match[bytes]) -> bool:
    """Whether the match is no part of a word, if that matters, and not amid base64, where it occurs by chance."""
    before, after = text[max(0, match.start() - 64) : match.start()], text[match.end() : match.end() + 64]
    if shape.is_word and not _BEFORE.search(before[-6:].decode("latin-1")):
        return False
    return not all(_ENCODED.fullmatch(side) and len(set(side)) >= 16 for side in (before, after))


@cache
def _shapes() -> tuple[_Shape, ...]:
    """All shapes, compiled when the first text is looked at: most programs never look at one."""
    found = [(kind, anchors, is_word, pattern, 0) for kind, anchors, is_word, pattern in _OWN]
    for kind, module, name, anchors, is_word in _LIBRARY:
        detector = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name)
        found += [(kind, anchors, is_word, each.pattern, each.flags & re.IGNORECASE) for each in detector.denylist]
    shapes = []
    for kind, anchors, is_word, pattern, flags in found:
        compiled = re.compile(pattern, flags | re.ASCII), re.compile(pattern.encode("latin-1"), flags)
        shapes.append(_Shape(kind, tuple(map(str.encode, anchors)), is_word, *compiled))
    return tuple(shapes)
