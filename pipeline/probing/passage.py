"""What passes by in a forward pass, at any layout: hooks on the blocks of a model that is asked.

    look(model, batch) -> Passage: of each block on this rank its hidden, queries, keys, ...

Blocks are found by number, so it does not matter which rank holds them. What tensor parallelism
splits by heads stays split: head h of this rank is head `first_head + h` of the model. What
sequence parallelism splits is whole here.

B micro-batch, S sequence, H hidden, D head width, N query heads of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pipeline.model.tensor_parallel import gather_sequence

if TYPE_CHECKING:
    from pipeline.data.batch import Batch
    from pipeline.engine.forward_only import ForwardOnly

Hook = Callable[..., Any]


@dataclass
class BlockPassage:
    """What passed by in one block; every field is set when the forward pass is over."""

    before: Tensor = field(init=False)
    """(B, S, H) residual stream before the block."""
    after: Tensor = field(init=False)
    """(B, S, H) residual stream after it."""
    attended: Tensor = field(init=False)
    """(B, S, H): what attention adds to the residual stream."""
    mlp: Tensor = field(init=False)
    """(B, S, H): what the MLP or the experts add."""
    context: Tensor = field(init=False)
    """(B, S, N * D): what the heads of this rank hand to the output projection."""
    queries: Tensor = field(init=False)
    """(B, N, S, D), rotated where positions are."""
    keys: Tensor = field(init=False)
    """(B, groups of this rank, S, D)."""
    scale: float = field(init=False)
    """What their products are multiplied with."""
    starts: Tensor | None = field(init=False)
    """(B, S) int64, the first key each query sees; None: all that are not later."""

    def note(self, core: Any, inputs: Any) -> None:
        """Queries, keys and what makes attention of them, as the module of it was given them."""
        self.queries, self.keys, _, self.starts = inputs
        self.scale = core.scale_of(self.queries)


Passage = dict[int, BlockPassage]
"""Number of the block -> what passed by in it; blocks of this rank only."""


def look(model: ForwardOnly, batch: Batch) -> Passage:
    """Run one micro-batch and keep what passes by. Collective: call on every rank."""
    splits_sequence = model.schema.sequence_ranks > 1

    def whole(hidden: Tensor) -> Tensor:
        return gather_sequence(hidden) if splits_sequence else hidden

    def stream(packed: Any) -> Tensor:
        hidden = model.schema.between.unpack(packed).hidden
        assert hidden is not None
        return whole(hidden)

    passage: Passage = {}
    with ExitStack() as hooks:
        for number, block in blocks_of(model).items():
            here = passage[number] = BlockPassage()

            def around(_m: Any, inputs: Any, out: Any, here: BlockPassage = here) -> None:
                here.before, here.after = stream(inputs[0]), stream(out)

            def attended(_m: Any, _in: Any, out: Tensor, here: BlockPassage = here) -> None:
                here.attended = whole(out)

            def mlp(_m: Any, _in: Any, out: Any, here: BlockPassage = here) -> None:
                here.mlp = whole(out[0] if isinstance(out, tuple) else out)

            def core(module: Any, inputs: Any, _out: Any, here: BlockPassage = here) -> None:
                here.note(module, inputs)

            def projected(_m: Any, inputs: Any, _out: Any, here: BlockPassage = here) -> None:
                here.context = inputs[0].transpose(0, 1) if splits_sequence else inputs[0]

            attention = block.self_attention
            for part, hook in [
                (block, around), (attention, attended), (block.mlp, mlp),
                (attention.core_attention, core), (attention.linear_proj, projected),
            ]:  # fmt: skip
                hooks.enter_context(hooked(part, hook))
        model.evaluate([batch])
    return passage


def blocks_of(model: ForwardOnly) -> dict[int, Any]:
    """Number of the block -> the block; those of this rank."""
    return {int(number): block for number, block in model.module.layers.items()}


@contextmanager
def hooked(module: nn.Module, hook: Hook, *, before: bool = False) -> Iterator[None]:
    """Inside, `hook` runs after each forward pass of the module, or before it."""
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def heads_here(model: ForwardOnly) -> range:
    """Numbers of the query heads that this rank computes, in every block of its stage."""
    count = model.model.num_attention_heads // model.layout.tensor.size
    return range(model.layout.tensor.rank * count, (model.layout.tensor.rank + 1) * count)
