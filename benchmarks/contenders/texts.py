"""The corpus of benchmarks/tokenize.py: text that is found on this machine, as jsonl.

Kept between runs: <name>.jsonl, the same in parts for engines that want a file a worker, and <name>.facts.json.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def make_corpus(work: Path, name: str, size_mb: int, *, parts: int) -> None:
    """work/<name>.jsonl of at least size_mb, the same in `parts` files in work/<name>.parts, and their facts."""
    facts = work / f"{name}.facts.json"
    wanted = {"wanted_mb": size_mb, "parts": parts}
    if facts.exists() and wanted.items() <= json.loads(facts.read_text()).items():
        return
    (work / f"{name}.parts").mkdir(parents=True, exist_ok=True)
    lines = text_bytes = 0
    split = [open(work / f"{name}.parts" / f"{i}.jsonl", "wb") for i in range(parts)]
    with open(work / f"{name}.jsonl", "wb") as whole:
        for text in real_texts():
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            whole.write(line)
            split[lines % parts].write(line)
            lines += 1
            text_bytes += len(text.encode())
            if text_bytes >= size_mb * 1e6:
                break
    for file in split:
        file.close()
    if text_bytes < 0.9 * size_mb * 1e6:
        print(
            f"only {text_bytes / 1e6:.0f} MB of text were found on this machine, {size_mb} wanted",
            file=sys.stderr,
        )
    facts.write_text(json.dumps(wanted | {"text_mb": text_bytes / 1e6, "documents": lines}))


def real_texts() -> Iterator[str]:
    """Texts of this machine, none twice: the standard library, installed packages, documentation, man pages."""
    paths = sysconfig.get_paths()
    folders = dict.fromkeys(
        [paths["stdlib"], paths["purelib"], "/usr/share/man", "/usr/share/doc", "/usr/share"]
    )
    suffixes = {f".{s}" for s in "py txt md rst gz html h pyi c js json xml pl pm".split()}
    seen: set[bytes] = set()
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix not in suffixes and "/man/" not in str(path) or not path.is_file():
                continue
            try:
                content = path.read_bytes()
                text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
            except (OSError, EOFError, UnicodeDecodeError):
                continue
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if text.strip() and "\0" not in text and len(text) < 4e6 and key not in seen:
                seen.add(key)
                yield text


def tokens_per_byte(path: Path, tokenizer: Any) -> float:
    """Of the corpus' first megabyte or so, by the reference."""
    with path.open() as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(200))]
    return sum(len(tokenizer.encode(t)) + 1 for t in texts) / sum(len(t.encode()) for t in texts)


def lines_of(work: Path, name: str) -> int:
    """Documents of a corpus."""
    return json.loads((work / f"{name}.facts.json").read_text())["documents"]
