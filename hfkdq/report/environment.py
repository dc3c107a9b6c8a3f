# SPDX-License-Identifier: Apache-2.0
"""Where a measurement ran, and which of its facts may be published.

Knows processors, versions and strings; nothing of models.
"""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .. import __version__

PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def describe_environment() -> dict[str, str]:
    """Processor, platform and versions, without names of the machine, its users or its folders."""
    facts = {
        "processor": _processor(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "hfkdq": __version__,
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return {name: value for name, value in facts.items() if value}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), flags=re.MULTILINE)
        if names:
            return str(names[0]).strip()
    return platform.processor()


def publishable(value: Any) -> Any:
    """`value` without the strings in it that are absolute paths or hold an access token of the Hub."""
    if isinstance(value, dict):
        return {key: publishable(item) for key, item in value.items() if not _is_private(item)}
    if isinstance(value, (list, tuple)):
        return [publishable(item) for item in value if not _is_private(item)]
    return value


def _is_private(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith("~")
    return absolute or _TOKEN.search(value) is not None
