"""One round of retraining: distills new shards with the champion, trains a candidate, and promotes it if it is better.

Section retrain of the configuration says where shards come, where the registry is and where rounds work; sections
distill, train, trainer, evaluate and runner configure the steps, section gates what a candidate must reach beside the
champion on the frozen set. Without new shards there is nothing to do. After a stop, the same command goes on with the
round that was begun; of two commands at once, one works and the other says who does.

Without --once, further rounds follow while shards have arrived meanwhile.

  air retrain --config configs/retrain.yaml --once

exit status: 0 the candidate is the champion now, or nothing is new; 1 a step failed, run the command again; 2 wrong
usage; 3 the candidate was refused, and the champion stays. The output names the gate and its numbers.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from jobs import distill as distilling
from jobs import train as training
from jobs.command import configure, make_parser
from jobs.evaluate import compare
from jobs.report import counted, print_outcome, print_table
from pipeline.bulk.distill import DistillConfig
from pipeline.config import RunnerConfig
from pipeline.errors import AliasMovedError, ConfigError
from pipeline.evaluation.config import EvaluateConfig
from pipeline.inputs.pictures import fingerprint
from pipeline.predictors import find_predictor, is_whole
from pipeline.registry.aliases import CANDIDATE, CHAMPION, NONE, newest_move, promote
from pipeline.registry.names import named_version
from pipeline.registry.versions import SHOWN_DIGITS, Version, publish, weights_uri
from pipeline.retraining.config import GatesConfig, RetrainConfig
from pipeline.retraining.gates import Gate, judge
from pipeline.retraining.rounds import (
    Comparison,
    Outcome,
    RoundPlan,
    begin_round,
    check_settings,
    commit_comparison,
    end_round,
    is_over,
    new_round,
    older_targets,
    read_comparison,
    read_rounds,
    round_folder,
    settings_of,
    targets_of,
)
from pipeline.retraining.shards import Seen, find_new_shards
from pipeline.storage.base import Storage
from pipeline.storage.open import open_storage
from pipeline.training.config import TrainConfig, TrainerConfig
from pipeline.work.holder import utc_now
from pipeline.work.lease import Lease, hold

EXIT_REFUSED = 3
"""The exit status where a candidate was refused."""

_SECTIONS = {
    "retrain": RetrainConfig,
    "gates": GatesConfig,
    "distill": DistillConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "trainer": TrainerConfig,
    "runner": RunnerConfig,
}


def main(arguments: Sequence[str]) -> int:
    """The command."""
    parser = make_parser("retrain", __doc__, RetrainConfig, GatesConfig)
    parser.add_argument("--once", action="store_true", help="one round, even if further shards arrive meanwhile")
    given = parser.parse_args(arguments)
    retrain, *others = configure(given, **_SECTIONS)
    outcomes = run_rounds(CycleConfig(retrain, *others), once=given.once)
    return EXIT_REFUSED if any(not outcome.promoted for outcome in outcomes) else 0


@dataclass(frozen=True)
class CycleConfig:
    """The configuration of a cycle and of its steps."""

    retrain: RetrainConfig
    gates: GatesConfig
    distill: DistillConfig
    train: TrainConfig
    evaluate: EvaluateConfig
    trainer: TrainerConfig
    runner: RunnerConfig


def run_rounds(config: CycleConfig, once: bool = True) -> list[Outcome]:
    """Ends the round that was begun, or begins one if there are new shards; returns how the rounds ended.

    Args:
        config: The cycle and its steps.
        once: One round at most; else rounds follow until nothing is new.

    Raises:
        ConfigError: The configuration is not complete, or contradicts itself.
        PlanMismatchError: A round was begun with other settings.
        LeaseHeldError: Another process works at the cycle.
        AirError: What the steps raise. What they committed stays.
    """
    retrain = config.retrain.complete()
    if config.evaluate.codec or config.evaluate.predictor is not None:
        raise ConfigError("evaluate: a cycle compares candidate and champion; leave predictor and codec out")
    assert retrain.work
    outcomes: list[Outcome] = []
    with hold(open_storage(retrain.work), "retrain", config.runner) as lease:
        cycle = _Cycle(config, retrain, lease)
        while not (once and outcomes) and (plan := cycle.open_round()) is not None:
            outcomes.append(cycle.work_on(plan))
    return outcomes


@dataclass(frozen=True)
class _Cycle:
    """The steps of a round, while this process holds the lease of the cycle's folder."""

    config: CycleConfig
    retrain: RetrainConfig
    lease: Lease
    work: Storage = field(init=False)
    registry: Storage = field(init=False)

    def __post_init__(self) -> None:
        for name in ("work", "registry"):
            storage = open_storage(getattr(self.retrain, name)).guarded(self.lease.check)
            object.__setattr__(self, name, storage)

    def open_round(self) -> RoundPlan | None:
        """The round that was begun and not ended, or a new one; None if there are too few new shards for one."""
        rounds = list(read_rounds(self.work))
        config = self.config
        sections = {"retrain": self.retrain, "gates": config.gates, "distill": config.distill}
        settings = settings_of({**sections, "train": config.train, "evaluate": config.evaluate})
        settings["frozen"] = [fingerprint(given) for given in self.retrain.frozen]
        for plan in rounds:
            if not is_over(self.work, plan):
                check_settings(self.work, plan, settings)
                print(f"round {plan.number} goes on, with {counted(plan.shards, 'new shard')}", flush=True)
                return plan
        known = [source for plan in rounds for source in plan.sources]
        sources = find_new_shards(self.retrain.shards, Seen(known))
        count = sum(len(source.units) for source in sources)
        if count < self.retrain.min_shards:
            few = f" ({count} of min_shards = {self.retrain.min_shards})" if count else ""
            seen = sum(len(source.units) for source in known)
            done = f"seen {counted(seen, 'shard')} in {counted(len(rounds), 'round')}"
            print(f"{self.work.uri()}: nothing new{few}; {done}")
            return None
        older = older_targets(self.work, rounds) if self.retrain.old_targets else []
        champion = newest_move(self.registry, CHAMPION)
        plan = new_round(rounds, sources, champion.version if champion else None, older, settings)
        self._check_steps(plan)
        print(f"round {plan.number} begins, with {counted(plan.shards, 'new shard')}", flush=True)
        return begin_round(self.work, plan)

    def work_on(self, plan: RoundPlan) -> Outcome:
        """Does every step of a round that is not done; returns how the round ended."""
        folder = round_folder(self.work, plan).guarded(self.lease.check)
        comparison = read_comparison(folder)
        if comparison is None:
            self._distill(plan)
            self._train(plan, folder)
            comparison = commit_comparison(folder, self._compare(plan, folder))
        return end_round(folder, self._decide(plan, folder, comparison))

    def _champion(self, plan: RoundPlan) -> Version | None:
        return named_version(self.registry, f"@{plan.champion}") if plan.champion else None

    def _check_steps(self, plan: RoundPlan) -> None:
        """Refuses a round whose steps cannot work, before its plan is written and its settings are fixed.

        Raises:
            ConfigError, CheckpointError, TrainingError: A step does not fit the champion or contradicts itself.
        """
        from pipeline.training.start import check_start

        distill = self._distill_config(plan)
        distill.settled(distill.find_predictor())
        train = self._train_config(plan)
        if train.from_:
            train = train.model_copy(update={"from_": find_predictor(train.from_).name})
        check_start(train, self.config.trainer)

    def _distill_config(self, plan: RoundPlan) -> DistillConfig:
        champion = self._champion(plan)
        if champion is None:
            return self.config.distill
        return self.config.distill.model_copy(update={"predictor": weights_uri(self.registry, champion)})

    def _train_config(self, plan: RoundPlan) -> TrainConfig:
        champion = self._champion(plan)
        if champion is None or self.retrain.start == "scratch":
            return self.config.train
        return self.config.train.model_copy(update={"from_": weights_uri(self.registry, champion)})

    def _distill(self, plan: RoundPlan) -> None:
        config = self._distill_config(plan)
        for source, targets in zip(plan.sources, targets_of(plan), strict=True):
            output = self.work.uri(targets)
            tally = distilling.distill(source.uri, output, config, self.config.runner, source.units)
            print_outcome(distilling.describe(tally), output, tally)

    def _train(self, plan: RoundPlan, folder: Storage) -> None:
        inputs = [self.work.uri(targets) for targets in (*plan.older, *targets_of(plan))]
        run = folder.uri("run")
        figures = training.train(inputs, run, self._train_config(plan), self.config.trainer, self.retrain.valid)
        print(training.describe(figures, run), flush=True)

    def _compare(self, plan: RoundPlan, folder: Storage) -> Comparison:
        """Measures candidate and champion on the frozen set, in one run."""
        from pipeline.retraining.trial import encode_one

        names = ("run/best.safetensors", "run/last.safetensors")
        path = next(name for name in names if name == names[-1] or is_whole(folder.uri(name)))
        candidate = find_predictor(folder.uri(path))
        champion = self._champion(plan)
        references = [candidate]
        if champion is not None and champion.sha256 != candidate.sha256:
            references.insert(0, find_predictor(weights_uri(self.registry, champion)))
        table = f"evaluation-{uuid.uuid4().hex[:8]}.parquet"
        evaluation = compare(self.retrain.frozen, references, self.config.evaluate, folder.uri(table))
        return Comparison(
            table=table,
            candidate=path,
            model=candidate.model,
            champion=champion.model if champion else None,
            rejected=dict(evaluation.rejected),
            diverged=evaluation.diverged[candidate.model],
            encode_error=encode_one(self.retrain.frozen, candidate),
        )

    def _decide(self, plan: RoundPlan, folder: Storage, comparison: Comparison) -> Outcome:
        """Publishes the candidate with its evidence, and promotes it if every gate holds."""
        rows = self._rows(folder, comparison)
        own = [row for row in rows if row["predictor"] == comparison.model]
        figures = {name: sum(row[name] for row in own) / len(own) for name in ("psnr", "ms_ssim") if own}
        evidence = {"evaluation.parquet": comparison.table, "round.json": "round.json", "train.json": "run/plan.json"}
        candidate = publish(
            self.registry,
            folder.uri(comparison.candidate),
            {name: folder.uri(path) for name, path in evidence.items()},
            figures,
        )
        promote(self.registry, CANDIDATE, candidate, f"round {plan.number}", round_id=plan.id)
        gates = judge(
            rows, comparison.model, comparison.champion, comparison.diverged, comparison.encode_error, self.config.gates
        )
        why = "; ".join(f"gate {gate.name}: {gate.said}" for gate in gates if not gate.passed)
        if comparison.champion == comparison.model:
            why = "the candidate has the champion's weights"
        if not why:
            reached = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            why = f"{reached}, all {len(gates)} gates hold"
            try:
                reason, expected = f"round {plan.number}: {why}", plan.champion or NONE
                promote(self.registry, CHAMPION, candidate, reason, expect=expected, round_id=plan.id)
            except AliasMovedError as error:
                why = f"the champion is another one than when the round began: {error}"
            else:
                return self._end(plan, candidate, candidate.id, gates, why, promoted=True)
        return self._end(plan, candidate, plan.champion, gates, why, promoted=False)

    def _rows(self, folder: Storage, comparison: Comparison) -> list[dict]:
        """The measurements with the fewest steps of refinement."""
        with folder.local_file(comparison.table) as local:
            rows = pq.read_table(local).to_pylist()
        return [row for row in rows if row["refine_steps"] == self.config.evaluate.refine[0]]

    def _end(
        self, plan: RoundPlan, candidate: Version, champion: str | None, gates: list[Gate], why: str, promoted: bool
    ) -> Outcome:
        print_table(
            f"gates of round {plan.number}",
            ("gate", "", "numbers"),
            [(gate.name, "holds" if gate.passed else "FAILS", gate.said) for gate in gates],
        )
        if promoted:
            before = f" in place of @{plan.champion[:SHOWN_DIGITS]}" if plan.champion else ""
            print(f"round {plan.number}: promoted @{candidate.short}{before}. {why}", flush=True)
        else:
            kept = f"@{champion[:SHOWN_DIGITS]} stays champion" if champion else "there is still no champion"
            print(f"round {plan.number}: refused @{candidate.short}; {kept}. {why}", flush=True)
        return Outcome(
            round=plan.id,
            promoted=promoted,
            candidate=candidate.id,
            champion=champion,
            why=why,
            gates=tuple(gates),
            ended=utc_now(),
        )
