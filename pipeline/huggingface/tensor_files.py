"""Which tensors a Hugging Face folder holds, and whether a model is made of just these; no torch.

folder --index--> name -> (file, name there, type) --check_tensors--> every one is used
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from pipeline.errors import CheckpointError
from pipeline.files import open_regular
from pipeline.huggingface.rules import Mapping
from pipeline.shapes import read_object

# Ends of names of what is computed from settings: causal masks, rotary frequencies.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
# What safetensors calls the types of weights that need no scales beside them.
FLOATS = ("F64", "F32", "F16", "BF16")


class Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    name: str
    """In that file; the folder's files may lack the prefix."""
    dtype: str
    """As safetensors spells it."""


def check_tensors(folder: Path, mapping: Mapping) -> dict[str, Place]:
    """Every tensor of the folder, where the model's class is made of them and of no others.

    Raises:
        CheckpointError: one is missing, quantised, would not be used, or is there twice.
    """
    found = index(folder)
    wanted = {name for rule in mapping.rules for name in rule.theirs}
    head = {"lm_head.weight"}  # under a tied config a copy of the word embedding: the reader looks
    others = sorted(found.keys() - wanted - mapping.zeros.keys() - mapping.idle.keys() - head)
    unused = [name for name in others if not name.endswith(BUFFERS)]
    if unused:
        more = f" and {len(unused) - 3} more" if unused[3:] else ""
        raise CheckpointError(
            f"{folder} holds {', '.join(unused[:3])}{more}, which this program would not use: it "
            "is another model than its config.json says. Its weights cannot be taken over."
        )
    for name in sorted(wanted | (head & found.keys())):
        if name not in found:
            raise CheckpointError(f"{folder} has no tensor {name}.")
        if found[name].dtype not in FLOATS:
            raise CheckpointError(
                f"{name} in {folder} is of type {found[name].dtype}: the weights are quantised. "
                "Take the folder they were made from, or write them as bf16 with transformers "
                "first."
            )
    return found


def index(folder: Path) -> dict[str, Place]:
    """Tensor name, as of the model with a head, to its place.

    Raises:
        CheckpointError: a file is missing or damaged, or two hold a tensor of one name.
    """
    from safetensors import safe_open

    found: dict[str, Place] = {}
    for path in weight_files(folder):
        try:
            open_regular(path).close()  # a pipe would be waited for, without end
            with safe_open(path, "numpy") as file:
                places = {
                    name: Place(path, name, str(file.get_slice(name).get_dtype()))
                    for name in file.keys()
                }
        except Exception as error:  # safetensors' own error type is not public
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        if twice := sorted(found.keys() & places.keys()):
            raise CheckpointError(
                f"{twice[0]} is in {found[twice[0]].path.name} and in {path.name} of {folder}: "
                "which one counts cannot be told. Take one of the files away."
            )
        found |= places
    prefix = next(
        (p for name in found for p in ("transformer.", "model.") if name.startswith(p)), None
    )
    if prefix is None:  # written from the bare model, as OpenAI's GPT-2 folders are
        prefix = "transformer." if "wte.weight" in found else "model."
        head = found.pop("lm_head.weight", None)
        found = {prefix + name: place for name, place in found.items()}
        found |= {"lm_head.weight": head} if head else {}
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: model.safetensors, or those of the index, or all.

    Folders may hold a second copy in its author's spelling (Mistral's consolidated.safetensors).

    Raises:
        CheckpointError: there is none, the index names others than *.safetensors of the folder, or
            an adapter's lie beside them.
    """
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder} holds an adapter (adapter_config.json), whose matrices transformers adds to "
            "the weights. Merge it into its base first, or take that file away."
        )
    if (folder / "model.safetensors").exists():  # before an index, which may be an older one's
        return [folder / "model.safetensors"]
    path = folder / "model.safetensors.index.json"
    if path.exists():
        shape = {"weight_map": {str: str}}
        content = read_object(path, shape, error=CheckpointError, misfit="is no index of weights")
        names = sorted(set(content["weight_map"].values()))
        if strange := [name for name in names if not re.fullmatch(r"\w[\w.-]*\.safetensors", name)]:
            raise CheckpointError(
                f"{path} names {strange[0]!r}, which is no *.safetensors file of its folder."
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} has no *.safetensors. Convert pytorch_model.bin with transformers' "
            "from_pretrained and save_pretrained."
        )
    return files
