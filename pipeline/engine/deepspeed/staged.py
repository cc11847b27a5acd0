"""A pipeline: the GPT as DeepSpeed's PipelineModule, and the runner of its schedules.

The module is cut into stages by the cost of its layers; 1F1B or DualPipeV, with ZeRO-1.
"""

from __future__ import annotations

import pipeline.engine.deepspeed.environment  # noqa: F401

# isort: split
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from pipeline.config.choices import PipelineSchedule
from pipeline.config.run_shape import RunShape
from pipeline.config.stages import partition, pipeline_costs, sends_gradients_first
from pipeline.distributed.layout import ParallelLayout
from pipeline.engine.deepspeed.base import BF16_SUMS, DeepSpeedRunner
from pipeline.engine.deepspeed.bf16_sums import flat_sums
from pipeline.engine.deepspeed.changes import reduce_tied_sums
from pipeline.engine.deepspeed.gradient_first import send_gradients_first
from pipeline.engine.deepspeed.reduction import Reduction
from pipeline.engine.forward_only import Stage, asking, first_input, sum_scores
from pipeline.model.architecture import Architecture
from pipeline.model.gpt import Loss, LossFunction, Measure
from pipeline.model.linear import LateProducts
from pipeline.model.names import canonical_name
from pipeline.model.stage_io import StageSchema
from pipeline.model.stage_layers import StageBlock, StageEmbedding, StageHead
from pipeline.patching import replace

if TYPE_CHECKING:
    from pipeline.data.batch import Batch


class StagedRunner(DeepSpeedRunner):
    """The Runner of pipeline_parallel_size above 1."""

    copies_nothing = "test_a_pipeline_copies_no_gradients[2]"

    @staticmethod
    def build_module(
        architecture: Architecture, schema: StageSchema, shape: RunShape, layout: ParallelLayout
    ) -> nn.Module:
        """This rank's stage (under DualPipeV: its two stages) of the model."""
        with redirect_stdout(StringIO()):  # DeepSpeed prints its topology
            return pipeline_module(architecture, schema, shape, layout)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As DeepSpeedRunner."""
        super().__init__(*args, **kwargs)
        self.schema: StageSchema = vars(self.module)["schema"]
        self.hidden_size = kwargs["architecture"].model.hidden_size
        self._activation_shape: tuple[int, ...] = ()
        if isinstance(self.wrapper, BF16_Optimizer) and self.layout.replica.size > 1:
            # The fp32 sums where they lie. DeepSpeed flattens all of them, and reduces a bf16 copy:
            # 6 more bytes a parameter at the end of a step.
            sums, group = flat_sums(self.wrapper), self.layout.replica.group
            reduction = Reduction(sums, group, self.parameters, to_owners=False)
            self._reduce_by(
                reduction.finish,
                why="reduces a flattened copy of the sums",
                proof=f"{BF16_SUMS}::test_a_pipeline_copies_no_gradients[4]",
            )
        self.late = LateProducts()
        if kwargs["loss_scale"]:
            reduce_tied_sums(self.deepspeed)
        architecture = kwargs["architecture"]
        if sends_gradients_first(
            architecture.model, architecture.precision, architecture.recompute
        ):
            send_gradients_first(self.deepspeed, self.module, self.late)
        if not self.deepspeed.is_last_stage():
            replace(
                self.deepspeed,
                "_aggregate_total_loss",
                self._receive_loss,
                why="copies zeros to the device to receive into, for which the host waits",
                upstream="not reported",
                proof="tests/engine/test_host_waits.py::test_a_step_reads_nothing_back[2]",
            )

    def run(self, batches: Sequence[Batch], weights: Sequence[Tensor | None]) -> None:
        """One batch through the schedule."""
        self._expect_shape(batches[0])
        self._loss = None
        self._loss = self.deepspeed.train_batch(micro_batch_stream(batches, weights, self.schema))

    def _receive_loss(self) -> Tensor:
        """The mean loss of the step, from the stage that has it: (its own ranks', all ranks')."""
        losses = torch.zeros(2, device=self.layout.device)
        source = self.deepspeed._loss_stage_global_rank()
        dist.broadcast(losses, src=source, group=self.deepspeed.mpu.get_pipe_parallel_group())
        return losses[1].clone()

    def _mean_loss(self) -> Tensor:
        return self.deepspeed._aggregate_total_loss()

    def evaluate(
        self, batches: Sequence[Batch], masks: Sequence[Tensor], measure: Measure, *, size: int = 2
    ) -> Tensor:
        """(size,) sums of a measure over all ranks."""
        module: Any = self.module
        with asking(module):
            return sum_scores(
                self._stages(),
                partial(module.loss_fn, loss=partial(measure, module.cross_entropy)),
                batches,
                masks,
                schema=self.schema,
                hidden_size=self.hidden_size,
                dtype=self.parameters[0].dtype,
                layout=self.layout,
                size=size,
            )

    def _stages(self) -> list[Stage]:
        """This rank's stage, or its two on a DualPipeV: r on the way down, r on the way up."""
        module: Any = self.module
        here, last = self.layout.pipeline.rank, self.layout.pipeline.size - 1
        before, after = (here - 1 if here else None), (here + 1 if here < last else None)
        if not isinstance(module, DualPipeVModule):
            return [Stage(module, before, after)]

        def run(phase: int, packed: Any) -> Any:
            module.activate_phase(phase)
            return module(packed)

        turn = here  # the last rank hands over to itself
        return [
            Stage(partial(run, 0), before, turn if after is None else after),
            Stage(partial(run, 1), turn if after is None else after, before),
        ]

    def _expect_shape(self, batch: Batch) -> None:
        shape = tuple(batch.tokens.shape)
        if self._activation_shape not in ((), shape):
            self.deepspeed.reset_activation_shape()
        self._activation_shape = shape


def pipeline_module(
    architecture: Architecture, schema: StageSchema, shape: RunShape, layout: ParallelLayout
) -> PipelineModule:
    """This rank's stage (under DualPipeV: its two stages) of the model."""
    model = architecture.model
    tied = model.tied_embeddings
    tie = {"tied_weight_attr": "word.weight"}
    specs: list[Any] = [
        TiedLayerSpec("embedding", StageEmbedding, architecture, schema, **tie)
        if tied
        else LayerSpec(StageEmbedding, architecture, schema),
        *[LayerSpec(StageBlock, architecture, schema, layer) for layer in range(model.num_layers)],
        LayerSpec(StageHead, architecture, schema),
    ]
    if tied:
        # The copy next to the loss owns neither position table nor picture encoder, and hands
        # hidden through: the loss takes its weight.
        through: Any = {"forward_fn": lambda _, hidden: hidden, "is_first": False, **tie}
        specs.append(TiedLayerSpec("embedding", StageEmbedding, architecture, schema, **through))
    costs = pipeline_costs(
        model,
        padded_vocab_size=shape.padded_vocab_size,
        seq_len=shape.seq_len,
        images_per_row=shape.images_per_row,
    )
    is_dual = architecture.parallel.pipeline_schedule is PipelineSchedule["dualpipev"]
    head = "embedding.word.weight" if tied else "head.weight"
    cross_entropy = Loss(architecture, layout.tensor.group)

    def loss_fn(hidden: Tensor, labels: Any, *, loss: LossFunction = cross_entropy) -> Tensor:
        named = module.named_parameters()
        weight = next(
            p for name, p in named if canonical_name(name, num_layers=model.num_layers) == head
        )
        return loss(hidden, weight, *(labels if isinstance(labels, tuple) else (labels, None)))

    module = (_DualPipeV if is_dual else _Staged)(
        specs,
        costs=costs,
        schema=schema,
        cross_entropy=cross_entropy,
        loss_fn=loss_fn,
        topology=PipeModelDataParallelTopology(
            num_pp=shape.sizes.pipeline,
            num_mp=shape.sizes.tensor,
            num_dp=shape.sizes.replicas,
        ),
        # Blocks recompute themselves, with megatron-core's random streams
        activation_checkpoint_interval=0,
    )
    return module


def micro_batch_stream(
    batches: Sequence[Batch], weights: Sequence[Tensor | None], schema: StageSchema
) -> Iterator[tuple[Any, Any]]:
    """(inputs, labels) a micro-batch, as PipelineEngine takes them."""
    for batch, token_weights in zip(batches, weights, strict=True):
        yield (
            schema.first.pack(first_input(batch)),
            batch.labels if token_weights is None else (batch.labels, token_weights),
        )


class _Staged(PipelineModule):
    """PipelineModule cut by the cost of its layers."""

    def __init__(
        self,
        specs: list,
        *,
        costs: list[float],
        schema: StageSchema,
        cross_entropy: Loss,
        **kwargs: Any,
    ) -> None:
        self._costs = costs
        super().__init__(specs, **kwargs)
        self.schema, self.cross_entropy = schema, cross_entropy

    def get_tied_weights_and_groups(self) -> list[tuple[Tensor, Any]]:
        """Without frozen weights: they have no gradient to reduce, and in bf16 no place for one."""
        tied = super().get_tied_weights_and_groups()
        return [(weight, group) for weight, group in tied if weight.requires_grad]

    def _partition_layers(self, method: str = "") -> None:
        self.parts = partition(self._costs, self.num_stages)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class _DualPipeV(DualPipeVModule, _Staged):
    """The same, in 2 * pipeline_parallel_size stages."""
