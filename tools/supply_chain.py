"""What is installed: pinned by hash, under licences that go with Apache-2.0, and listed with a release.

    python tools/supply_chain.py lock       requirements.lock again, after pyproject.toml or constraints.txt has changed
    python tools/supply_chain.py check      this environment: versions of constraints.txt, licences, pip check
    python tools/supply_chain.py sbom FILE  a CycloneDX list of this environment, by cyclonedx-bom

`lock` needs uv, `sbom` cyclonedx-bom (pip install uv==0.13.9 cyclonedx-bom==7.5.0, in any environment). The lock has no torch and
nothing that only torch's CUDA build wants: which build an index serves differs (a folder of CPU wheels, PyTorch's own
index, PyPI), and so do the hashes; pip takes torch by constraints.txt, after the rest has been installed by hash.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
# What .ci/run installs: `make .venv/dev` owns the list.
EXTRAS = re.findall(r"\[(dev,.*)\]", (ROOT / "Makefile").read_text())[0].split(",")
# torch, and what only its CUDA build requires.
TORCH = re.compile(r"(torch|triton|cuda-.*|nvidia-.*)")
# Installers and the project itself: in an environment, but no requirement of ours.
OURS = {"pip", "setuptools", "wheel", "uv", "pretrain"}
HEAD = f"""\
# Every requirement but torch, by hash, for Linux and Python 3.11 to 3.13. Made by: python tools/supply_chain.py lock
#   pip install --require-hashes --no-deps -r requirements.lock && pip install -c constraints.txt -e ".[{",".join(EXTRAS)}]"
"""

# May be used and passed on with a program under Apache-2.0. MPL-2.0 asks for changes to its own files only.
ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python",
    "HPND", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Unlicense", "Zlib",
}  # fmt: skip
# What classifiers and the old free-text field call them.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause", "Apache 2.0": "Apache-2.0", "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0", "Apache Software License": "Apache-2.0", "Apache Software License 2.0": "Apache-2.0",
    "BSD": "BSD-3-Clause", "BSD License": "BSD-3-Clause", "ISC License": "ISC", "ISC License (ISCL)": "ISC",
    "MIT License": "MIT", "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "Public-Domain": "CC0-1.0",
    "Python Software Foundation License": "PSF-2.0", "The Unlicense (Unlicense)": "Unlicense", "zlib/libpng License": "Zlib",
}  # fmt: skip
# Their metadata names a choice, which no classifier can: what hjson's LICENSE.txt says, and, from
# memory, tld's; its source was not at hand.
KNOWN = {
    "hjson": "MIT",  # a choice, told as two classifiers
    "tld": "MPL-2.0",  # MPL-1.1 or GPL-2.0 or LGPL-2.1: a choice
}


def lock() -> None:
    """Write requirements.lock."""
    command = ["uv", "pip", "compile", "pyproject.toml", *(word for extra in EXTRAS for word in ("--extra", extra)),
               "-c", "constraints.txt", "--universal", "--generate-hashes", "--no-annotate", "--no-header", "--quiet"]  # fmt: skip
    made = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    LOCK.write_text(
        HEAD + "".join(block for name, block in blocks(made) if not TORCH.fullmatch(name))
    )


def blocks(text: str) -> Iterable[tuple[str, str]]:
    """(name, its lines) of every requirement in a requirements file with hashes."""
    for match in re.finditer(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==.*\n(?:    --hash=.*\n)+", text, re.MULTILINE):  # fmt: skip
        yield normal(match[1]), match[0]


def pins(text: str) -> dict[str, str]:
    """Name to version, as constraints or a lock say."""
    found = re.finditer(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^ ;\\\n]+)", text, re.MULTILINE)
    return {normal(match[1]): match[2] for match in found}


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(found: Distribution) -> str:
    """The SPDX expression, or as much as a distribution says of it; '' when it says nothing."""
    metadata = found.metadata
    if expression := KNOWN.get(normal(metadata["Name"])) or metadata.get("License-Expression"):
        return expression
    classifiers = [
        line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier") or [] if line.startswith("License :: ")
    ]  # fmt: skip
    named = [name for name in classifiers if name != "OSI Approved"]
    text = (metadata.get("License") or "").strip().partition("\n")[0].strip()
    return " AND ".join(named) or text


def is_allowed(expression: str) -> bool:
    """Whether all that apply, or one of those that may be chosen, go with Apache-2.0."""
    expression = SPDX.get(expression, expression)
    inner = re.sub(r"\(([^()]*)\)", lambda m: m[0].replace(" ", "\0"), expression)
    for word, judge in ((r" AND ", all), (r" OR ", any)):
        parts = re.split(word, inner, flags=re.IGNORECASE)
        if len(parts) > 1:
            return judge(is_allowed(part.replace("\0", " ")) for part in parts)
    if re.fullmatch(r"\([^()]*\)", expression):
        return is_allowed(expression[1:-1])
    return expression in ALLOWED


def problems(found: Iterable[Distribution], pinned: dict[str, str]) -> list[str]:
    """What of an environment is not as it should be, one line each."""
    wrong = []
    for one in found:
        name, version = normal(one.metadata["Name"]), one.version
        if name in OURS:
            continue
        if not TORCH.fullmatch(name) and pinned.get(name) != version:
            wrong.append(f"{name} {version} is installed, constraints.txt has {pinned.get(name)}")
        # NVIDIA's libraries come with torch's CUDA build under their own terms; nothing here contains them.
        if not name.startswith(("nvidia-", "cuda-")) and not is_allowed(licence(one)):
            wrong.append(f"{name} {version}: licence {licence(one)!r} is not known to go with Apache-2.0; read it, and add it to tools/supply_chain.py")  # fmt: skip
    return wrong


def check() -> int:
    """Print each distribution's licence, then what is wrong; the exit code."""
    found = sorted(distributions(), key=lambda one: normal(one.metadata["Name"]))
    for one in found:
        print(f"{normal(one.metadata['Name'])} {one.version}: {licence(one)}")
    wrong = problems(found, pins((ROOT / "constraints.txt").read_text()))
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    wrong += (done.stdout + done.stderr).splitlines() if done.returncode else []
    print("\n".join([f"{len(found)} distributions, {len(wrong)} problems", *wrong]))
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("command", choices=["lock", "check", "sbom"])
    parser.add_argument("file", nargs="?", help="sbom: where to write")
    options = parser.parse_args()
    if options.command == "lock":
        lock()
    elif options.command == "check":
        return check()
    else:
        if not options.file:
            parser.error("sbom FILE")
        tool = ["cyclonedx-py", "environment", sys.executable, "--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "library"]  # fmt: skip
        subprocess.run(
            [*tool, "--output-format", "JSON", "--output-file", options.file], check=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
