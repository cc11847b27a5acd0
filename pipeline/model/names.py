"""Canonical parameter names: the same in every layout, in checkpoints, in settings and in the logs.

They are embedding.word.weight, embedding.position.weight, layers.<i>.<module>.<parameter>,
final_norm.weight, head.weight; of a picture encoder vision.patch.weight, vision.position.weight,
vision.layers.<i>.<module>.<parameter>, vision.linear_1.weight, vision.linear_2.weight.
"""

from __future__ import annotations


def canonical_name(name: str, *, num_layers: int) -> str:
    """The layout-free name of a parameter of a GPT or of a pipeline module.

    PipelineModule numbers its layers: 0 embedding, 1 .. num_layers blocks, num_layers + 1 head;
    tied modules have names of their own.
    """
    name = name.removeprefix("tied_modules.")
    first, _, rest = name.partition(".")
    if first.isdigit():
        index = int(first)
        if index == 0:
            name = f"embedding.{rest}"
        elif index <= num_layers:
            name = f"layers.{index - 1}.{rest}"
        else:
            name = f"head.{rest}"
    name = name.removeprefix("embedding.") if name.startswith("embedding.vision.") else name
    return name.replace("head.norm.", "final_norm.").replace("head.word.", "head.")
