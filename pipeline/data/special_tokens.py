"""Special tokens that no text can spell.

    tokenizer.json -> the same, its special tokens under names that hold U+0000

`tokenizers` looks for special tokens in text before anything else, and can be told not to; but what
is left is given to the model, which finds them again where its vocabulary has them: as a word
(WordLevel, WordPiece), a piece (Unigram), or what merges lead to (BPE).
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any


def without_special_tokens(content: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A tokenizer.json for texts: ids are the same, but no text gives one of `names`.

    Args:
        content: the parsed file; not changed.
        names: of the tokens, as the file spells them. An unknown word still gives the model's
            unknown token, whatever it is called.
    """
    hidden = {name: f"\0{name}\0" for name in names}
    model = copy.copy(content["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(word, word): i for word, i in model["vocab"].items()}
    else:  # Unigram: [piece, score] in the order of ids
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, hidden)]
    added = [
        token | {"content": hidden.get(token["content"], token["content"])}
        for token in content.get("added_tokens") or []
    ]
    # Templates name special tokens; they would add tokens to a text, which is never wanted.
    return content | {"model": model, "added_tokens": added, "post_processor": None}


def _touches(merge: str | list[str], names: Collection[str]) -> bool:
    """Whether a merge makes one of the tokens, or makes something of it."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def is_merged(content: dict[str, Any], name: str) -> bool:
    """Whether ordinary text leads to a BPE token: a single character, or the end of a merge."""
    if len(name) == 1:
        return True
    merges = content["model"].get("merges") or []
    return any("".join(m.split(" ") if isinstance(m, str) else m) == name for m in merges)
