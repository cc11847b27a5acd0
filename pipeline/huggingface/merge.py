"""An adapter and its base as one whole checkpoint, which every command takes.

    base + alpha / rank * B A, fp32, one parameter at a time
    --> rank-00000.safetensors, tensors.json, checkpoint.json, tokenizer, template, SHA256SUMS

Without moments: it is a base for further training, not a run to go on with.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.record import CHAT_TEMPLATE, RECORD, attachment, read_record
from pipeline.errors import CheckpointError
from pipeline.files import write_durably
from pipeline.huggingface.whole_model import open_model


def merge(path: Path, output: Path, *, base: Path | None = None) -> int:
    """Write the whole model of an adapter's checkpoint; exit code 0.

    Args:
        path: a run, which means its newest checkpoint, or one checkpoint.
        output: folder to write; must be new or empty.
        base: where the base is now; None: where it was when the adapter was trained.

    Raises:
        CheckpointError: not an adapter, a damaged one, another base, or a folder with something.
    """
    import torch

    from pipeline.checkpoint.index import file_name
    from pipeline.checkpoint.safetensors_file import write_safetensors
    from pipeline.checkpoint.tensors import index_of

    checkpoint = folders.find(path)
    record = read_record(checkpoint)
    if record.base is None:
        raise CheckpointError(f"{checkpoint} holds a whole model: there is nothing to merge.")
    if problems := folders.damage(checkpoint):
        raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(problems)}.")
    folders.check_new(output)
    tensors = open_model(checkpoint, base=base)
    output.mkdir(parents=True, exist_ok=True)
    shapes = {f"weights/{name}": tensors.shape(f"weights/{name}") for name in tensors.parameters}
    whole = [(0, name, shape, (0,) * len(shape), shape) for name, shape in shapes.items()]
    sums = {
        folders.INDEX: write_durably(output / folders.INDEX, json.dumps(index_of(whole)).encode())
    }
    keyed = {f"{name}@{','.join('0' * len(shape))}": shape for name, shape in shapes.items()}
    values = (tensors.tensor(name) for name in shapes)
    file = file_name(0)
    _, sums[file] = write_safetensors(output / file, keyed, values, torch.float32)
    for name in ("tokenizer.json", CHAT_TEMPLATE):
        if (content := attachment(checkpoint, name)) is not None:
            sums[name] = write_durably(output / name, content)
    config = {key: value for key, value in record.config.items() if key != "finetune"}
    size = 4 * sum(map(math.prod, shapes.values()))
    merged = dataclasses.replace(record, base=None, config=config, size_bytes=size)
    sums[RECORD] = write_durably(output / RECORD, merged.to_json().encode())
    write_durably(output / folders.SUMS, folders.sums_text(sums).encode())
    print(
        f"{output}: {len(shapes)} weights of {checkpoint} and {record.base['path']}, merged in fp32"
    )
    return 0
