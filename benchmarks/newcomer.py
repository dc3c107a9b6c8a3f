#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The path of a newcomer, by the commands of the README, from an empty folder to a card on a Hub, each step timed.

    make newcomer FOLDER=path/to/an/empty/folder

The Hub is the small one that the tests have on the loopback interface. The own data are the demo's digits, as folders of PNG files; the
own model is the demo's teacher. Packages come from pip's cache where it has them. What the steps print is in `log/` below the folder.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL.Image import fromarray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.hub_server import HubServer  # noqa: E402

COMPRESSED, CARD = "teacher-compressed", "run the program of the card"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def of_readme(start: str, **words: str) -> str:
    """The command of the README that starts so, without its remark, with the words put in the place of its own."""
    found = re.search(rf"^{re.escape(start)}.*?(?=  +#|$)", README, re.MULTILINE)
    if found is None:
        raise ValueError(f"The README has no command that starts with {start!r}.")
    command = found[0]
    for word, other in words.items():
        command = re.sub(rf"(?<![\w/.-]){word}(?![\w.-])", other, command)
    return command


def path(source: str, here: Path) -> dict[str, str]:
    """The commands, by what they are for; `here` is the clone that they run in."""
    own = {"model": "out/demo/teacher", "data": "digits"}
    files = {
        "checkpoint": "out/demo/onnx-int8",
        "checkpoint-onnx": f"{COMPRESSED}/onnx",
        "teacher": own["model"],
        "data": "digits:test",
    }
    compress = of_readme("hfkdq compress model --data data --dry-run", **own)
    return {
        "clone": f"git clone -q {source} {here}",
        "an environment": f"{sys.executable} -m venv own",
        "install": of_readme("pip install"),
        "demo, with an environment of its own": of_readme("make demo"),
        "the plan for a model and data of one's own": compress,
        "compress it": compress.replace("--dry-run", f"--output-dir {COMPRESSED}"),
        "compare it with the demo's": of_readme("hfkdq report", **files),
        "publish it": of_readme("hfkdq push", **files),
        CARD: "python card.py",
    }  # fmt: skip


def write_digits(folder: Path) -> None:
    """A folder of PNG files for each digit: 1,397 of scikit-learn's images to train on, and 400 to test on."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    for split, chosen in (("train", order[400:]), ("test", order[:400])):
        for i in chosen:
            file = folder / split / str(digits.target[i]) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            fromarray((digits.images[i] * 255 / 16).astype(np.uint8)).save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="an empty folder")
    parser.add_argument("--source", default=str(ROOT), help="what git clones")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty. Name an empty folder.")
    here = options.folder.resolve() / "hfkdq"
    steps = path(options.source, here)
    hub = HubServer()
    place = {**hub.environment(options.folder.resolve() / "home"), "VIRTUAL_ENV": str(here / "own")}
    place["PATH"] = f"{here / 'own' / 'bin'}{os.pathsep}{place['PATH']}"
    place.pop("PYTHONPATH", None)
    table = Table("step", "command", "seconds")
    (options.folder / "log").mkdir()
    for number, (name, command) in enumerate(steps.items()):
        if name == CARD:
            card = hub.repositories["me/name"].files()["README.md"].decode()
            picture = next((here / "digits" / "test" / "7").iterdir())
            program = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
            (here / "card.py").write_text(re.sub(r'"[^"]*\.(png|jpg)"', f'"{picture}"', program))
        log = options.folder / "log" / f"{number}.txt"
        print(f"{name}: {command}", flush=True)
        start = time.monotonic()
        with log.open("w") as file:
            done = subprocess.run(
                command, shell=True, cwd=here if here.exists() else options.folder, env=place, stdout=file, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
        seconds = time.monotonic() - start
        if done.returncode:
            sys.exit(f"{name} failed after {seconds:.0f} s: {log}")
        told = command.replace(f"{here.parent}/", "").replace(sys.executable, "python")
        table.add_row(name, escape(told), f"{seconds:.0f}")
        if name == "clone":
            write_digits(here / "digits")
    Console(width=180).print(table)
    (options.folder / "card.md").write_bytes(hub.repositories["me/name"].files()["README.md"])
    print(f"On the Hub: {', '.join(sorted(hub.repositories['me/name'].files()))}")
    print((options.folder / "log" / f"{len(steps) - 1}.txt").read_text().strip().splitlines()[-1])


if __name__ == "__main__":
    main()
