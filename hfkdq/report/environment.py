# SPDX-License-Identifier: Apache-2.0
"""Where a measurement ran, and which of its facts may be published."""

from __future__ import annotations

import contextlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

from ..secrets import find_secrets, redact
from ..version import __version__

MEDIUM = re.compile(r"data:(image/png|audio/wav);base64,[A-Za-z0-9+/]*={0,2}")
"""The address of an image or a sound that is in the address itself."""
PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime", "openvino")
# Folders of users and machines within a longer text.
_PATH = re.compile(
    r"(?:^|[^\w.~/])(?:/(?:home|Users|root|tmp|var|mnt|data|work|workspace|scratch|opt|srv|private|etc|usr|nfs|content|kaggle)/"
    r"|~/|file://|[A-Za-z]:\\|\\\\\w)"
)


def describe_environment() -> dict[str, str]:
    """Processor, platform and versions, without names of the machine, its users or its folders."""
    facts = {
        "processor": _processor(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "hfkdq": __version__,
    }
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            facts[package] = version(package)
    return {name: value for name, value in facts.items() if value}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return platform.processor() if name is None else name[1].strip()


def publishable(value: Any) -> Any:
    """`value` without the strings in it that are or name absolute paths, or hold a secret."""
    if isinstance(value, dict):
        return {key: publishable(item) for key, item in value.items() if not (_is_private(key) or _is_private(item))}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [publishable(item) for item in value if not _is_private(item)]
    return value


def hide_secrets(value: Any) -> Any:
    """`value` with `***` in place of secrets in its strings, names of fields included."""
    if isinstance(value, dict):
        return {hide_secrets(key): hide_secrets(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_secrets(item) for item in value]
    # Letters of an image in base64 can be those of a secret by chance.
    return redact(value) if isinstance(value, str) and not MEDIUM.fullmatch(value) else value


def _is_private(value: Any) -> bool:
    if isinstance(value, PurePath):
        return True
    if not isinstance(value, str):
        return False
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith("~")
    return absolute or _PATH.search(value) is not None or bool(find_secrets(value.encode(errors="backslashreplace")))
