"""The loop, until the steps are done or a notice comes.

    data -> step -> metrics -> evaluation -> checkpoint

Everything it needs is built in `Trainer.__init__`; every method is called on every rank alike.
"""

from __future__ import annotations

import gc
from dataclasses import asdict
from pathlib import Path

import torch

from pipeline import cli
from pipeline.checkpoint import folder as folders
from pipeline.checkpoint.adapters import Base, as_json, recorded_base
from pipeline.checkpoint.checkpointer import Checkpointer
from pipeline.checkpoint.record import RunRecord
from pipeline.config.choices import Precision
from pipeline.config.parameter_names import freezes
from pipeline.config.pretrain import PretrainConfig
from pipeline.config.run_shape import RunShape
from pipeline.data.batch import Batch
from pipeline.distributed.layout import ParallelLayout
from pipeline.distributed.ranks import RankHost
from pipeline.engine.engine import StepResult
from pipeline.errors import DataUsedUp, DivergedError
from pipeline.evaluation.perplexity import Evaluator
from pipeline.files import write_durably
from pipeline.log import logger
from pipeline.resilience import notice
from pipeline.resilience.bookkeeping import bookkeeping
from pipeline.resilience.clock import Clock
from pipeline.resilience.guard import Action, Guard
from pipeline.resilience.step_agreement import StepAgreement, StepSummary
from pipeline.resilience.stragglers import Stragglers
from pipeline.tracking.history import has_evaluation
from pipeline.tracking.metrics import Metrics, SilentMetrics
from pipeline.training.best import BestCheckpoint
from pipeline.training.build import build_loader, build_looks, build_watched_engine
from pipeline.training.initial_weights import begin, load_base
from pipeline.training.privacy import check_same, earlier_private_runs, noise_salt, spent
from pipeline.training.run_metrics import open_metrics
from pipeline.training.state import TrainState, is_due
from pipeline.training.step_extras import StepExtras


class Trainer:
    """One run, from its newest checkpoint to its last step."""

    def __init__(
        self,
        cfg: PretrainConfig,
        shape: RunShape,
        layout: ParallelLayout,
        *,
        run_dir: Path,
        clock: Clock,
        hosts: list[RankHost],
    ) -> None:
        self.cfg, self.shape, self.layout = cfg, shape, layout
        self.run_dir, self.clock, self.hosts = run_dir, clock, hosts
        self.state = TrainState()
        self.evaluated_step: int | None = None  # the last one, None before the first
        self.base: Base | None = None  # of a run that trains a part
        logger.info("building the model")
        self.engine = build_watched_engine(cfg, shape, layout, run_dir=run_dir)
        clock.alive()
        cache_dir = Path(cfg.data.cache_dir or run_dir / "cache")
        self.loader = build_loader(cfg, shape, layout, cache_dir=cache_dir)
        self.evaluator = Evaluator(
            cfg.data, shape=shape, engine=self.engine, sequences=cfg.training.eval_sequences,
            cache_dir=cache_dir,
        )  # fmt: skip
        places = folders.places(run_dir, cfg.checkpoint.fallback_dir)
        self.checkpoints = Checkpointer(
            cfg.checkpoint,
            folder=places[0],
            fallback=places[1] if places[1:] else None,
            layout=layout,
            attachments=self.loader.attachments(),
            alive=clock.alive,
        )
        self.guard = Guard(cfg.resilience, loss_scaling=cfg.training.precision is Precision.fp16)
        self.agreement = StepAgreement(layout.device)
        self.stragglers = Stragglers(
            ratio=cfg.resilience.straggler_ratio, device=layout.device, group=layout.host_group
        )
        self.extras = StepExtras(cfg, loader=self.loader, engine=self.engine, layout=layout)
        self.best = BestCheckpoint(places, layout) if cfg.checkpoint.keep_best else None
        self.metrics: Metrics = SilentMetrics()
        if layout.ranks.is_main:
            datasets = self.loader.state()["datasets"]
            self.metrics = open_metrics(cfg, shape, run_dir, clock=clock, datasets=datasets)
        self.looks = build_looks(
            cfg, engine=self.engine, loader=self.loader, held_out=self.evaluator.datasets,
            metrics=self.metrics, clock=clock,
        )  # fmt: skip

    def fit(self) -> None:
        """Train to the last step, or to a notice; the state is on disk when this returns."""
        self.restore()
        self.metrics.begin(self.state)
        logger.info("the first step takes longer: memory is allocated in it")
        if self.state.step and self.is_due(self.cfg.training.eval_every) and not self.is_evaluated:
            self.evaluate()  # the start that saved this step ended before it was evaluated
        while self.state.step < self.shape.total_steps:
            batches = self.next_batches()  # num_micro_batches x (micro_batch_size, seq_len)
            result = self.train_step(batches)  # forward, backward, clip, update
            extras = self.extras.of(self.state.step)  # collective where all ranks count
            self.metrics.record(self.state, result, data_wait_ms=self.loader.wait_ms, extra=extras)
            summaries = self.agree_on(result)  # collective
            if any(self.react(summary) is Action.rollback for summary in summaries):
                continue
            if self.is_due(self.cfg.checkpoint.save_every):
                self.save()
            # Some rank was asked to leave, all know.
            if any(summary.notice for summary in summaries):
                break
            if self.is_due(self.cfg.training.eval_every):  # after the save: whatever it meets
                self.evaluate()
            self.looks.after(self.state)  # collective
            if self.is_due(self.cfg.resilience.straggler_every):
                self.report_stragglers()
            self.collect_garbage()
        self.finish()

    # ---- parts of a step -------------------------------------------------------------------------

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens after this one."""
        return is_due(every, self.state.step)

    @property
    def is_evaluated(self) -> bool:
        """Whether the evaluation of the present step is done."""
        return self.evaluated_step == self.state.step

    def next_batches(self) -> list[Batch]:
        """This rank's share of the next step.

        Raises:
            DataUsedUp: on every rank; what is done is on the disk.
        """
        self.clock.enter("data", self.state.step)
        try:
            return self.loader.next_step()
        except DataUsedUp:
            self.save_and_wait()
            raise

    def train_step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step, applied or skipped. Collective."""
        self.clock.enter("train", self.state.step)
        result = self.engine.train_step(batches, step=self.state.step, max_loss=self.guard.max_loss)
        self.state.advance(self.shape.at(self.state.step))
        return result

    def describe_step(self) -> str:
        """Which samples the present step reads, for the watchdog's page."""
        return f"Sample hash of the step: {self.loader.sample_hash}."

    def agree_on(self, result: StepResult) -> list[StepSummary]:
        """What all ranks know alike of unjudged steps, and whether one of them was given notice.

        On CUDA that is the step before; at a checkpoint and at the end also the newest, so that
        what is kept is judged.
        """
        step = self.state.step
        known = [
            self.agreement.agree(
                step - 1,
                loss=result.loss,
                grad_norm=result.grad_norm,
                skipped=result.skipped,
                notice=notice.received() is not None,
            )
        ]
        if self.is_due(self.cfg.checkpoint.save_every) or step == self.shape.total_steps:
            known.append(self.agreement.drain())
        return [summary for summary in known if summary]

    def react(self, summary: StepSummary) -> Action:
        """Judge the step and do what the policy says.

        Raises:
            DivergedError: the run cannot go on by itself.
        """
        self.state.skipped_steps += summary.skipped
        known = len(self.guard.ledger)
        action = self.guard.judge(summary)
        for event in self.guard.ledger[known:]:
            self.warn(f"step {event.step}: {event.kind} (loss {event.loss}): {event.action}")
            self.metrics.event(
                self.state,
                {f"resilience/{event.kind}": event.step, "resilience/action": event.action},
            )
        if action is Action.stop:
            raise DivergedError(self.guard.report())
        if action is Action.rollback:
            self.roll_back(before=summary.step)
        return action

    def roll_back(self, *, before: int) -> None:
        """Return to the newest checkpoint without step `before`, and on behind the samples read."""
        reached = self.state.samples_seen
        record = self.checkpoints.restore(self.engine, not_after=before)
        if record is None:
            raise DivergedError(f"there is no checkpoint to roll back to.\n{self.guard.report()}")
        self.agreement.drain()  # of a step that started from the bad one
        self.guard.restore(record.guard, keep_ledger=True)
        self.state = TrainState.of(record.state)
        self.loader.restore(record.loader)
        skipped = reached - self.state.samples_seen
        self.loader.skip_samples(skipped)
        self.warn(f"rolled back to step {self.state.step}; {skipped} samples are skipped")
        self.state.samples_seen = reached
        self.metrics.undo(self.state)

    def evaluate(self) -> None:
        """Loss, perplexity and bits per byte on the held-out datasets."""
        self.clock.enter("evaluation", self.state.step)
        self.evaluated_step = self.state.step
        results = self.evaluator.run(alive=self.clock.alive)
        self.metrics.record_eval(self.state, results)
        if self.best is not None and self.best.is_beaten(results):
            self.save_and_wait()
            if self.is_evaluated:  # else the newest step was bad, and the run is back before it
                self.best.mark(self.state.step, results)

    def report_stragglers(self) -> None:
        """Name the slowest rank, and warn of ranks that stay slow."""
        report = self.stragglers.report(data_wait_ms=self.loader.wait_ms)
        self.metrics.event(self.state, report.metrics())
        if report.stragglers:
            self.warn(report.warning(self.hosts))

    def warn(self, message: str) -> None:
        """Say once what all ranks know alike."""
        if self.layout.ranks.is_main:
            logger.warning(message)

    def collect_garbage(self) -> None:
        """Collect on all ranks at one step: a rank that collects alone stalls every all-reduce."""
        if self.is_due(self.cfg.training.gc_every):
            gc.collect()

    # ---- start and end ---------------------------------------------------------------------------

    def restore(self) -> None:
        """Continue at the newest good checkpoint, or begin."""
        if self.cfg.training.gc_every:
            gc.disable()
        if self.layout.ranks.is_main:  # a longer total_steps takes a finished run up again
            with bookkeeping("DONE"):
                (self.run_dir / "DONE").unlink(missing_ok=True)
        source = self.cfg.checkpoint.init_from
        if source and freezes(self.cfg.model, self.cfg.finetune):  # no checkpoint holds these
            self.base = load_base(self.engine, Path(source))
        record = self.checkpoints.restore(self.engine) if self.cfg.checkpoint.resume else None
        if record is not None:
            check_same(self.cfg.finetune.dp, record)
            self.state = TrainState.of(record.state)
            self.state.restarts += 1
            self.loader.restore(record.loader)
            self.guard.restore(record.guard)
            if (base := recorded_base(record)) is not None and self.base is not None:
                base.check(self.base)
            self.evaluated_step = self.recorded_evaluation()  # collective
        else:
            begin(self.engine, self.cfg.checkpoint, self.cfg.finetune, base=self.base)
        if self.engine.private is not None:
            self.engine.private.salt = noise_salt(record, cli.to_dict(self.cfg), self.layout)
        self.earlier = earlier_private_runs(self.cfg.checkpoint, record, self.layout)  # collective

    def recorded_evaluation(self) -> int | None:
        """The present step, if metrics.jsonl has its evaluation, as the main rank sees it.

        Collective: call on every rank.
        """
        names = [dataset.name for dataset in self.evaluator.datasets]
        found = [
            self.layout.ranks.is_main and has_evaluation(self.run_dir, self.state.step, names=names)
        ]
        torch.distributed.broadcast_object_list(found, src=0, group=self.layout.host_group)
        return self.state.step if found[0] else None

    def save(self) -> None:
        """Write a checkpoint; does nothing when this step is already on disk."""
        self.clock.enter("save", self.state.step)
        stall_ms = self.checkpoints.save(self.engine, step=self.state.step, run=self.record())
        self.guard.checkpoint_saved()
        values = {
            "resilience/checkpoint_stall_ms": stall_ms,
            "resilience/failed_saves": self.checkpoints.failed_saves,
        }
        self.metrics.event(self.state, values)

    def save_and_wait(self) -> None:
        """Put the present state on the disk, its last step judged; wait until it is there.

        Raises:
            CheckpointError: it could not be written, checkpoint.max_failed_saves times.
        """
        if summary := self.agreement.drain():
            self.react(summary)
        self.save()
        while not self.checkpoints.wait():
            self.save()

    def record(self) -> RunRecord:
        """What a checkpoint holds besides tensors."""
        spent_privacy = None
        if (private := self.engine.private) is not None:
            dp, reads = self.cfg.finetune.dp, self.loader.most_reads()
            spent_privacy = spent(
                dp, reads=reads, seq_len=self.shape.seq_len, salt=private.salt, earlier=self.earlier
            )
        return RunRecord(
            state=asdict(self.state),
            loader=self.loader.state(),
            guard=self.guard.state(),
            **self.loader.special_ids(),
            base=as_json(self.base),
            privacy=spent_privacy,
            spent_before=self.earlier or None,
            config=cli.to_dict(self.cfg),
        )

    def finish(self) -> None:
        """Leave everything on disk.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        self.save_and_wait()
        is_done = self.state.step >= self.shape.total_steps
        if is_done and not self.is_evaluated:
            self.evaluate()
        self.loader.close()
        self.clock.enter("end", self.state.step)
        if is_done:
            self.metrics.finish(self.state)
        if is_done and self.layout.ranks.is_main:
            with bookkeeping("DONE"):
                write_durably(self.run_dir / "DONE", f"{self.state.step}\n".encode())
        why = "done" if is_done else "leaving on notice"
        logger.info("%s at step %d of %d", why, self.state.step, self.shape.total_steps)
