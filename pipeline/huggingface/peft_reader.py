"""The low-rank matrices of a `peft` folder under our names, to go on training them.

    adapter_config.json, adapter_model.safetensors --PeftMatrices--> linear -> (A, B)

peft has an A for each of query, key and value (gate and up); we have one for the fused linear. Each
distinct A becomes rows of ours, and B is 0 where its columns meet another one's rows: the same
function at lora_rank = distinct As * r, with the lora_alpha that keeps the scale. Whatever else
adapter_config.json turns on is refused by name. To look at a folder needs no torch.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from pipeline.config.finetune import FinetuneConfig
from pipeline.config.model import ModelConfig
from pipeline.config.parameter_names import linear_shapes, lora_stems
from pipeline.errors import CheckpointError
from pipeline.files import open_regular, parse_json
from pipeline.huggingface.mapping import mapping_for
from pipeline.huggingface.rules import Rule
from pipeline.huggingface.tensor_files import FLOATS
from pipeline.shapes import read_object

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
SHAPE = {
    "peft_type": str,
    "r": range(1, 2**20),
    "lora_alpha": float,
    "use_rslora?": (None, bool),
    "base_model_name_or_path?": (None, str),
}
# Read here, or of no effect on what the matrices mean: targets and layers stand in the names of the
# tensors, fan_in_fan_out matters where weights are merged. All else must be off.
FREE = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "base_model_name_or_path", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "task_type"),
    *("auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "eva_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
# First matrices that leave the base as it is; those of PiSSA, OLoRA and LoftQ change it.
HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")


class PeftMatrices:
    """The matrices of a folder, of which our low-rank matrices are made."""

    def __init__(self, folder: Path, model: ModelConfig, finetune: FinetuneConfig) -> None:
        """Compare the folder with the settings; `model` has its vocab_size.

        Raises:
            CheckpointError: no such folder, or one with more than low-rank matrices of our linears,
                or `finetune` has no room for them; the message gives the settings to change.
        """
        self.folder, self._file = folder, folder / WEIGHTS
        settings = _read_settings(folder)
        self.base: str | None = settings.get("base_model_name_or_path")
        """The model that they stand beside: a folder, or a name on the hub."""
        self._rank: int = settings["r"]
        width = math.sqrt(self._rank) if settings.get("use_rslora") else self._rank
        self._scale: float = settings["lora_alpha"] / width
        mapping, self._linears = mapping_for(model), linear_shapes(model)
        self._is_transposed = mapping.is_transposed
        rules = {rule.name.removesuffix(".weight"): rule for rule in mapping.rules}
        self._rules = {stem: rule for stem, rule in rules.items() if stem in self._linears}
        self._digests = self._look()
        self._check_room(model, finetune)

    @property
    def stems(self) -> list[str]:
        """Canonical names, without their ends, of the linears that have matrices in the folder."""
        found = self._digests
        return [s for s, rule in self._rules.items() if any(m in found for m in _modules(rule))]

    def pair(self, stem: str) -> tuple[Tensor, Tensor]:
        """(A (k, in), B (out, k)) of a linear, fp32; k is at most lora_rank.

        Raises:
            CheckpointError: they cannot be read.
        """
        import torch

        rule, (rows, _) = self._rules[stem], self._linears[stem]
        owners = self._owners(stem)
        places = {digest: self._rank * number for number, digest in enumerate(owners)}
        sizes = [rows]
        if not self._is_transposed:
            sizes = [len(part) for part in rule.split(torch.empty(rows, 1, device="meta"))]
        b = [torch.zeros(size, self._rank * len(owners)) for size in sizes]
        a = torch.cat([self._read(module, "A") for module in owners.values()])
        for module, part in zip(_modules(rule), b, strict=True):
            if module in self._digests:
                theirs, at = self._read(module, "B"), places[self._digests[module]]
                if len(theirs) != len(part):
                    raise CheckpointError(
                        f"{self._file}: the B of {module} has {len(theirs)} rows, the linear "
                        f"{len(part)}. Is this the model that the adapter belongs to?"
                    )
                part[:, at : at + self._rank] = theirs
        # The rule of a weight turns Conv1D's matrix; B is not turned there.
        return a, rule.join([part.t() for part in b] if self._is_transposed else b)

    def _read(self, module: str, kind: str) -> Tensor:
        """A or B of a module of theirs, fp32."""
        try:
            with safe_open(self._file, "pt") as file:
                matrix: Tensor = file.get_tensor(_key(module, kind))
        except Exception as error:  # safetensors' own error type is not public
            raise CheckpointError(f"{self._file} cannot be read: {error}.") from error
        return matrix.float()

    def _owners(self, stem: str) -> dict[str, str]:
        """Each distinct A of a linear, by digest, and the first of their modules that has it."""
        found: dict[str, str] = {}
        for module in _modules(self._rules[stem]):
            if module in self._digests:
                found.setdefault(self._digests[module], module)
        return found

    def _look(self) -> dict[str, str]:
        """Module of theirs to a digest of its A, after every tensor was found to be one of ours.

        Raises:
            CheckpointError: the file is damaged, or holds something else.
        """
        known = {m: stem for stem, rule in self._rules.items() for m in _modules(rule)}
        header, begin = _read_header(self._file)
        pairs: dict[str, set[str]] = {}
        for name, entry in header.items():
            match = MATRIX.fullmatch(name)
            if match is None or match[1] not in known:
                raise CheckpointError(
                    f"{self._file} holds {name}, and low-rank matrices stand beside the linears of "
                    "attention and MLP only. Train that adapter with peft, or merge it there "
                    "(merge_and_unload) and give the merged folder as checkpoint.init_from."
                )
            if entry["dtype"] not in FLOATS:
                raise CheckpointError(f"{self._file}: {name} is of type {entry['dtype']}.")
            shape, (_, columns) = entry["shape"], self._linears[known[match[1]]]
            if shape != ([self._rank, columns] if match[2] == "A" else [*shape[:1], self._rank]):
                raise CheckpointError(
                    f"{self._file}: {name} is {tuple(shape)}; r is {self._rank}, and this model's "
                    f"linear takes {columns} numbers. Is this the model that the adapter belongs "
                    "to?"
                )
            pairs.setdefault(match[1], set()).add(match[2])
        if lone := sorted(module for module, kinds in pairs.items() if len(kinds) < 2):
            raise CheckpointError(f"{self._file} has only one matrix of the two of {lone[0]}.")
        if not pairs:
            raise CheckpointError(f"{self._file} holds no matrices.")
        with open_regular(self._file) as stream:
            digests = {}
            for module in pairs:
                first, last = header[_key(module, "A")]["data_offsets"]
                stream.seek(begin + first)
                digests[module] = hashlib.sha256(stream.read(last - first)).hexdigest()
        return digests

    def _check_room(self, model: ModelConfig, finetune: FinetuneConfig) -> None:
        """Raise CheckpointError, with the settings to change, unless our matrices hold theirs."""
        wanted = []
        missing = set(self.stems) - set(lora_stems(model, finetune))
        if missing and finetune.lora_rank:
            kinds = dict.fromkeys(re.sub(r"layers\.\d+", "*", s) for s in self.stems)
            wanted.append(f"finetune.lora_targets='[{','.join(kinds)}]'")
        need = self._rank * max(len(self._owners(stem)) for stem in self.stems)
        rank = max(need, finetune.lora_rank)
        if rank != finetune.lora_rank:
            wanted.append(f"finetune.lora_rank={rank}")
        if not math.isclose(finetune.lora_alpha, self._scale * rank, rel_tol=1e-6):
            wanted.append(f"finetune.lora_alpha={self._scale * rank:.9g}")
        if wanted:
            why = ""
            if need > self._rank:
                why = (
                    f" Its r is {self._rank}, and up to {need // self._rank} matrices A "
                    "of it stand beside one linear of ours, which has one."
                )
            raise CheckpointError(
                f"{self.folder} does not fit these low-rank matrices.{why} To go on training it, "
                f"set {' '.join(wanted)}."
            )


def _modules(rule: Rule) -> list[str]:
    """Their linears that ours is made of."""
    return [name.removesuffix(".weight") for name in rule.theirs]


def _key(module: str, kind: str) -> str:
    """The name of A or B in the file."""
    return f"base_model.model.{module}.lora_{kind}.weight"


def _read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        CheckpointError: it is missing, damaged, or turns on what is not computed here.
    """
    path = folder / SETTINGS
    if not path.exists():
        raise CheckpointError(f"{folder} is no folder of peft: it has no {SETTINGS}.")
    settings = read_object(path, SHAPE, error=CheckpointError, misfit="is damaged")
    if found := list(_not_computed(settings)):
        raise CheckpointError(
            f"{folder} cannot be trained on here: its {SETTINGS} has {', '.join(found)}. Low-rank "
            "matrices of one rank and scale, and nothing else, stand beside the linears here. "
            "Train that adapter with peft, or merge it there (merge_and_unload) and give the "
            "merged folder as checkpoint.init_from."
        )
    return settings


def _not_computed(settings: dict[str, Any]) -> Iterator[str]:
    """What adapter_config.json turns on beyond what is computed here."""
    if settings["peft_type"] != "LORA":
        yield f"peft_type={settings['peft_type']}"
    for key, value in settings.items():
        if key == "init_lora_weights":
            if value not in HARMLESS_INIT:
                yield f"{key}={value}"
        elif key not in FREE and value and not (key == "bias" and value == "none"):
            yield f"{key}={value}"


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(name to dtype, shape, data_offsets of each tensor; where in the file their bytes begin).

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        open_regular(path).close()  # a pipe would be waited for, without end
        with safe_open(path, "np"):  # checks the header, every offset in it and the file's size
            pass
        with open_regular(path) as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = parse_json(stream.read(length))
    except Exception as error:  # safetensors' own error type is not public
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    header.pop("__metadata__", None)
    return header, 8 + length
