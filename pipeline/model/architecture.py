"""All that building a model, or a stage of it, needs to know."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from megatron.core.transformer.transformer_config import TransformerConfig

from pipeline.config.choices import Float8, Precision, Recompute
from pipeline.config.model import ModelConfig
from pipeline.config.training import ParallelConfig
from pipeline.config.vision import encoder_of
from pipeline.model.megatron_config import transformer_config
from pipeline.model.rope import RopeTable, rope_table


@dataclass(frozen=True)
class Architecture:
    """All that building a model, or a stage of it, needs."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: Precision
    """Of forward and backward passes."""
    vocab_size: int
    padded_vocab_size: int
    recompute: Recompute = Recompute.none
    """What a backward pass computes again."""
    recompute_every: int = 1
    """recompute=full: every n-th block."""
    fp8: Float8 = Float8.none
    """Arithmetic of the blocks' linears."""
    is_causal: bool = True
    """Whether a token sees no later one; false in the picture encoder."""

    @property
    def transformer(self) -> TransformerConfig:
        """megatron-core's view of a block."""
        return transformer_config(self.model, self.parallel)

    @property
    def encoder(self) -> Architecture:
        """Of the picture encoder's blocks: cut by tensor parallelism, never along a sequence."""
        whole = replace(
            self.parallel, sequence_parallel=False, context_parallel_size=1, expert_parallel_size=1
        )
        return replace(self, model=encoder_of(self.model), parallel=whole, is_causal=False)

    @cached_property
    def rope(self) -> RopeTable:
        """The rotary tables that all blocks share.

        Each block's own were 2 GiB in 32 blocks of 128 wide heads, for sequences of 131,072 tokens.
        """
        return rope_table(self.model)
