# SPDX-License-Identifier: Apache-2.0
"""What is a secret and what is none, in every encoding, and in good time."""

import base64
import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hfkdq import secrets
from hfkdq.secrets import find_secrets, find_secrets_in_file, redact, without_secrets

from . import tiny

pytestmark = pytest.mark.every_case

HF = "hf_" + "A1b2C3d4" * 5
B64 = "Ab1+/xyZ90" * 20
SECRETS = {
    HF: "Hugging Face access token",
    "hf_" + "AbCdEfGh" * 4 + "Ij": "Hugging Face access token",
    "api_org_" + "AbCdEfGh" * 4 + "Ij": "Hugging Face access token",
    "ghp_" + "a1B2" * 9: "GitHub token",
    "gho_" + "a1B2" * 9: "GitHub token",
    "ghs_" + "a1B2" * 9: "GitHub token",
    "github_pat_" + "11ABCDEFG0" * 2 + "_" + "a1B2c3D4" * 7: "GitHub token",
    "glpat-" + "a1B2_c3D4-" * 2: "GitLab token",
    "sk-" + "a1B2" * 12: "OpenAI API key",
    "sk-proj-" + "a1B2_c3D4-" * 8: "OpenAI API key",
    "sk-ant-api03-" + "a1B2_c3D4-" * 9: "Anthropic API key",
    "AIza" + "a1B2_c3" * 5: "Google API key",
    "ya29." + "a1B2_c3D4-" * 6: "Google OAuth token",
    "GOCSPX-" + "a1B2" * 7: "Google OAuth secret",
    "xoxb-" + "1234567890-" * 2 + "a1B2" * 6: "Slack token",
    "sk_live_" + "a1B2" * 6: "Stripe key",
    "npm_" + "a1B2" * 9: "npm token",
    "pypi-AgEIcHlwaS5vcmc" + "a1B2_c3D4-" * 10: "PyPI token",
    "AKIA" + "ABCD2345" * 2: "AWS access key",
    "ASIA" + "ABCD2345" * 2: "AWS access key",
    "AWS_SECRET_ACCESS_KEY=" + "a1B2/c3D4+" * 4: "AWS secret key",
    "AccountKey=" + B64[:86] + "==": "Azure storage key",
    "-----BEGIN PRIVATE KEY-----": "private key",
    "-----BEGIN OPENSSH PRIVATE KEY-----": "private key",
    "-----BEGIN ENCRYPTED PRIVATE KEY-----": "private key",
    "-----BEGIN PGP PRIVATE KEY BLOCK-----": "private key",
    "eyJ" + "a1B2" * 5 + ".eyJ" + "a1B2" * 9 + "." + "a1B2_" * 8: "JSON Web Token",
    "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567": "Weights & Biases API key",
    'wandb.login(key="' + "0123456789abcdef" * 2 + '01234567")': "Weights & Biases API key",
    "machine api.wandb.ai\n  login user\n  password "
    + "0123456789abcdef" * 2
    + "01234567": "Weights & Biases API key",
    "r8_" + "a1B2" * 9 + "c": "Replicate token",
    "123456789:AA" + "a1B2_c3D4-e" * 3: "Telegram bot token",
    "SG." + "a1B2" * 5 + "cd." + "a1B2" * 10 + "cde": "SendGrid API key",
    "SK" + "0123456789abcdef" * 2: "Twilio key",
    "MTk4NjIyNDgzNDcxOTI1MjQ4.Cl2FMQ.ZnCjm1XVW7vRze4b7Cq4se7kKWs": "Discord bot token",
    "https://user:s3cret@example.org/x": "address with a password",
    "postgres://admin:p%40ss!w@db/x": "address with a password",
    "https://x.blob.core.windows.net/a?sv=1&sig=" + "a1B2%2F" * 7: "signed address",
}
AROUND = ["{}", "x = '{}'", '{{"a": "{}"}}', "first\\n{}\\n", "TOKEN_{}", "=%3D{}&", "a\n{}\n", "\u00e9\u4e2d{}\u00e9"]


@pytest.mark.parametrize("secret", SECRETS, ids=SECRETS.values())
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_secrets_are_found_in_every_text(secret, encoding):
    for around in AROUND:
        text = around.format(secret)
        assert SECRETS[secret] in find_secrets(text.encode(encoding)), text
        assert SECRETS[secret] in find_secrets(bytes(100_000) + text.encode(encoding) + b"\xff" * 100_000), text


@pytest.mark.parametrize("secret", SECRETS, ids=SECRETS.values())
def test_secrets_are_hidden_in_texts(secret):
    hidden = redact(f"before {secret} after")
    assert secret not in hidden
    assert "***" in hidden
    assert hidden.startswith("before ")
    assert hidden.endswith((" after", "*** after", "x after", "/x/x after", ") after", '") after'))
    assert find_secrets(hidden.encode()) == []
    assert redact(hidden) == hidden


def test_escapes_in_json_hide_nothing():
    assert find_secrets(json.dumps({"a": f"\n{HF}"}).encode())
    assert find_secrets(("hf\\u005f" + HF[3:]).encode())


@pytest.mark.parametrize(
    "text",
    ["hf_hub_download", "convert_hf_checkpoint_to_onnx", "hf_" + "x" * 10, "hf_***", "https://huggingface.co/me/model", "https://user:***@host",
     "https://{user}:{password}@host", "task-0123456789abcdef0123456789abcdef", "sk-learn", "http://host:8080/a@b", "me@example.org",
     "-----BEGIN CERTIFICATE-----", "sha256:" + "0123456789abcdef" * 4, "en-us", "1700000000:abc", "tokenizer_class", "FALKIA", '"AC", "SK"'],
)  # fmt: skip
def test_what_only_looks_alike_is_none(text):
    assert find_secrets(text.encode()) == []
    assert redact(text) == text


def test_weights_vocabularies_and_base64_have_none(tmp_path):
    generator = np.random.default_rng(0)
    data = generator.bytes(3_000_000)
    for encoded in (
        data,
        base64.b64encode(data[:600_000]),
        base64.urlsafe_b64encode(data[:600_000]),
        data[:300_000].hex().encode(),
    ):
        assert (
            find_secrets(json.dumps({"blob": encoded.decode("latin-1")}).encode() if encoded is not data else data)
            == []
        )
    for kind in ("uint8", "int8", "int64", "float16", "float32"):
        assert find_secrets(generator.normal(60, 30, 300_000).astype(kind).tobytes()) == []
    tiny.bert().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    save_file({"a": torch.randn(1000, 1000)}, tmp_path / "more.safetensors")
    for path in tmp_path.iterdir():
        assert find_secrets_in_file(path) == [], path


def test_a_token_amid_base64_is_chance_and_at_its_edge_is_not():
    blob = base64.urlsafe_b64encode(np.random.default_rng(0).bytes(3000)).decode()
    assert find_secrets(f"{blob}{HF}{blob}".encode()) == []
    assert find_secrets(f"{blob} {HF}".encode())
    assert find_secrets(f"{'x' * 1000}{HF}{'x' * 1000}".encode())


@pytest.mark.parametrize("shift", [0, 1, 20, 43, 44, 100])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-32-le"])
def test_files_are_read_in_pieces_that_overlap(tmp_path, monkeypatch, shift, encoding):
    monkeypatch.setattr(secrets, "_CHUNK", 1 << 17)
    path = tmp_path / "weights"
    path.write_bytes(b"\xff" * ((1 << 17) - shift) + HF.encode(encoding) + b"\xff" * (1 << 17))
    assert find_secrets_in_file(path) == ["Hugging Face access token"]
    assert max(map(len, secrets._chunks(path))) <= (1 << 17) + (1 << 13)


def test_weights_are_searched_in_good_time():
    data = np.random.default_rng(0).bytes(16_000_000)
    find_secrets(b"")
    start = time.process_time()
    find_secrets(data)
    assert time.process_time() - start < 3


def test_an_environment_without_secrets():
    kept = {
        "PATH": "/usr/bin", "PWD": "/x", "OLDPWD": "/y", "HOME": "/root", "HF_HOME": "/cache", "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "0", "NO_PROXY": "127.0.0.1", "GIT_AUTHOR_NAME": "me", "HTTP_PROXY": "http://proxy:3128",
        "MONKEY": "x", "PYTHONPATH": "/x", "LD_LIBRARY_PATH": "/lib",
    }  # fmt: skip
    names = [
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "hf_token",
        "MY_TOKENS",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "OPENAI_API_KEY",
        "WANDB_APIKEY",
        "DB_PASSWORD",
        "PGPASSFILE_PASSWD",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "SSH_PRIVATE_KEY",
        "PRIVATEKEY",
        "SSH_AUTH_SOCK",
        "AUTHORIZATION",
        "COOKIE",
        "SESSION_COOKIES",
        "DB_PWD",
        "SENTRY_DSN",
        "GITHUB_PAT",
        "KEY",
        "SIGNING_KEY",
        "OAUTH_ID",
    ]
    values = {"PIP_INDEX_URL": "https://me:pw@host/simple", "NOTE": f"mine is {HF}", "ODD": "\udc80" + HF}
    assert without_secrets({**kept, **dict.fromkeys(names, "x"), **values}) == kept
