"""What an estimate reads of a run, and what each rank of its pipeline holds.

    PretrainConfig, RunShape --Job.of--> Job --stages--> a Stage of each pipeline rank

Pure functions of the config; imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.config.choices import OptimizerName, Precision
from pipeline.config.finetune import FinetuneConfig
from pipeline.config.layout_rules import is_dual
from pipeline.config.model import ModelConfig
from pipeline.config.model_shape import ModelShape, resolve
from pipeline.config.parameter_names import (
    is_linear_weight,
    parameter_names,
    parameter_shapes,
    trained_names,
)
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.config.stages import partition, pipeline_costs, places_of
from pipeline.config.training import ParallelConfig, TrainingConfig
from pipeline.config.vision import encoder_of
from pipeline.planning.trained import first_trained_layer, is_of_expert, size_on_a_rank


@dataclass(frozen=True)
class Stage:
    """What one rank of the pipeline holds; of DualPipeV, of both its stages."""

    rank: int
    """Place in the pipeline."""
    layers: int
    """Blocks."""
    reached_layers: int
    """Blocks that the backward pass reaches."""
    has_embedding: bool
    has_head: bool
    """Whether the loss is computed here."""
    parameters: float
    """Numbers on a tensor-parallel rank, low-rank matrices included."""
    trained: float
    """Of them, those that are trained."""
    by_muon: float
    """Of the trained, those that Muon updates; AdamW has the others."""
    trained_experts: float
    """Of these, those of experts."""


@dataclass(frozen=True)
class Job:
    """The sections of a run that decide what it needs and takes."""

    model: ModelConfig
    parallel: ParallelConfig
    training: TrainingConfig
    finetune: FinetuneConfig
    optimizer: OptimizerName
    shape: RunShape

    @classmethod
    def of(cls, cfg: PretrainConfig, shape: RunShape) -> Job:
        """Of a run's settings and derived numbers."""
        return cls(
            model=cfg.model,
            parallel=cfg.parallel,
            training=cfg.training,
            finetune=cfg.finetune,
            optimizer=cfg.optimizer.name,
            shape=shape,
        )

    @cached_property
    def sizes(self) -> ModelShape:
        """The model's sizes without nulls."""
        return resolve(self.model)

    @property
    def width(self) -> int:
        """Bytes of a number of the forward pass."""
        return 4 if self.training.precision is Precision.fp32 else 2

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch on a copy of the model, before its ranks share them."""
        return self.shape.micro_batch_size * self.shape.seq_len // self.shape.sizes.context

    @property
    def key_copies(self) -> int:
        """How often each key/value head stands in attention (model/context_parallel.py)."""
        context = self.shape.sizes.context
        groups = self.sizes.num_query_groups // self.shape.sizes.tensor
        return context // math.gcd(groups, context)

    @property
    def num_micro_batches(self) -> int:
        """Of a step once every ramp has ended."""
        return self.shape.at(self.shape.total_steps).num_micro_batches

    @property
    def sequence_ranks(self) -> int:
        """Tensor-parallel ranks that share hidden states."""
        return self.shape.sizes.tensor if self.parallel.sequence_parallel else 1

    @property
    def is_dual(self) -> bool:
        """Whether each rank of the pipeline has two stages."""
        return self.shape.sizes.pipeline > 1 and is_dual(self.parallel)

    @property
    def trains_all(self) -> bool:
        """Whether every parameter of the model is trained, and no other."""
        return "*" in self.finetune.train and not self.finetune.lora_rank

    @property
    def expert_copies(self) -> float:
        """Ranks that hold the same experts and share their optimizer state."""
        sizes = self.shape.sizes
        return sizes.replicas if sizes.expert == 1 else sizes.tensor * sizes.replicas / sizes.expert

    def copies(self, stage: Stage) -> float:
        """Ranks that ZeRO shares a trained number's state out to; of a mixture, in the mean."""
        data, experts = self.shape.sizes.replicas, stage.trained_experts
        if not experts:
            return data
        return stage.trained / ((stage.trained - experts) / data + experts / self.expert_copies)

    @cached_property
    def encoder(self) -> Job | None:
        """The picture encoder as a model of its own, whose sequences are pictures; None: none."""
        sizes = self.sizes.vision
        if sizes is None:
            return None
        shape = replace(
            self.shape,
            sizes=replace(self.shape.sizes, context=1, expert=1),
            micro_batch_size=self.shape.micro_batch_size * self.shape.images_per_row,
            seq_len=sizes.num_patches,
            images_per_row=0,
        )
        parallel = replace(self.parallel, sequence_parallel=False)
        return replace(
            self,
            model=encoder_of(self.model),
            parallel=parallel,
            shape=shape,
            finetune=FinetuneConfig(),
        )

    @cached_property
    def trains_encoder(self) -> bool:
        """Whether a backward pass goes through the picture encoder's blocks."""
        names = trained_names(parameter_names(self.model, self.finetune), self.model, self.finetune)
        parts = {name.split(".")[1] for name in names if name.startswith("vision.")}
        return bool(parts - {"linear_1", "linear_2"})

    @property
    def table(self) -> float:
        """Numbers of the word embedding on a tensor-parallel rank, padding included."""
        return self.shape.padded_vocab_size * self.model.hidden_size / self.shape.sizes.tensor

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What each rank of the pipeline holds, first to last."""
        pipeline = self.shape.sizes.pipeline
        costs = pipeline_costs(
            self.model,
            padded_vocab_size=self.shape.padded_vocab_size,
            seq_len=self.shape.seq_len,
            images_per_row=self.shape.images_per_row,
        )
        bounds = partition(costs, pipeline * (2 if self.is_dual else 1))
        places = [set(range(a, b)) for a, b in zip(bounds, bounds[1:])]
        if self.is_dual:  # rank r has stage r on the way down and the r-th from the end
            places = [places[r] | places[-1 - r] for r in range(pipeline)]
        return tuple(self._stage(rank, held, len(costs) - 1) for rank, held in enumerate(places))

    def _stage(self, rank: int, places: set[int], last: int) -> Stage:
        """The stage that holds these places of the list of layers."""
        first = first_trained_layer(self.model, self.finetune) if not self.trains_all else 0
        blocks = [place for place in places if 1 <= place <= self.model.num_layers]
        held = self._numbers(places)
        return Stage(
            rank=rank,
            layers=len(blocks),
            reached_layers=sum(1 for place in blocks if place > first),
            has_embedding=0 in places,
            has_head=last in places,
            parameters=held,
            trained=held if self.trains_all else self._numbers(places, trained_only=True),
            by_muon=self._numbers(places, trained_only=True, counts=is_linear_weight)
            if self.optimizer is OptimizerName.muon
            else 0.0,
            trained_experts=self._numbers(places, trained_only=True, counts=is_of_expert)
            if self.model.moe.num_experts
            else 0.0,
        )

    def _numbers(
        self,
        places: set[int],
        *,
        trained_only: bool = False,
        counts: Callable[[str], bool] = lambda _: True,
    ) -> float:
        """Numbers of the parameters at these places on a tensor-parallel rank.

        All blocks are alike: one of them is counted, and no name of the others is made, unless it
        matters which are trained. A search asks this thousands of times.
        """
        model, finetune, ranks = self.model, self.finetune, self.shape.sizes
        if not self.trains_all:
            names = parameter_names(model, finetune)
            wanted = set(trained_names(names, model, finetune)) if trained_only else set(names)
        else:
            model, wanted = replace(model, num_layers=1), set()
        shapes = parameter_shapes(model, finetune, vocab_size=self.shape.padded_vocab_size)
        blocks = sum(1 for place in places if 1 <= place <= self.model.num_layers)
        total = 0.0
        for name, shape in shapes.items():
            if not counts(name):
                continue
            size = size_on_a_rank(name, shape, tensor=ranks.tensor, expert=ranks.expert)
            if self.trains_all and name.startswith("layers."):
                total += blocks * size
            elif self.trains_all or name in wanted:
                here = [p for p in places_of(name, model) if self._place(p, model) in places]
                # The copy of a tied embedding beside the loss is the embedding where both are here.
                total += size * min(1, len(here))
        return total

    def _place(self, place: int, model: ModelConfig) -> int:
        """A place of `model`'s list of layers, in this model's."""
        behind_blocks = place > model.num_layers
        return place + (self.model.num_layers - model.num_layers if behind_blocks else 0)

    def micro_batches_in_flight(self, stage: Stage) -> float:
        """Micro-batches whose activations a rank holds at most.

        1F1B: the first stage has begun as many as there are stages when the first comes back.
        DualPipeV: 2 PP + 1 halves of the model on every rank (DeepSeek-V3's table 2).
        """
        pipeline = self.shape.sizes.pipeline
        if self.is_dual:
            return min((2 * pipeline + 1) / 2, self.num_micro_batches)
        return min(pipeline - stage.rank, self.num_micro_batches)
