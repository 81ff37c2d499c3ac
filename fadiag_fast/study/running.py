"""Train and audit a suite, run by run, so that a study that was stopped goes on where it was.

A run's folder, ``OUT/{model}/{rule}/seed_{s}``, has its checkpoints ``step_{n}.pt``, ``run.json``
once training has ended, well or badly, and ``audit.json`` with the figures of every checkpoint.
Each file is written whole or not at all. ``run.json`` holds the run's configuration and its hash:
a run is trained again only if it has none, or one that failed.

A run that was stopped half-way goes on from its last checkpoint, with the same result as if it had
not been: while it trains its folder also has ``resume.pt``, which holds what that takes. Where this
is damaged or does not fit (another configuration, device, version of torch or of the rule's code; a
checkpoint that is gone; a rule that keeps more than is carried, see :class:`Rule`) the run starts
again at its first step, and so does one that failed.

Several runs may go on at once, each on a thread of its own and on a GPU on a stream of its own.
They share the images, on the device, and nothing else, so that a run's figures do not depend on
what ran beside it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._common.files import write_whole
from .._common.jsonio import plain, strict
from .._common.process import prompt_switches
from .._common.text import first_line
from .._version import __version__
from ..checkpoints import load_checkpoint, load_into, save_checkpoint
from ..credit import CreditReport
from ..diagnosis import diagnose
from ..zoo import (
    CannotResume,
    ImageDataset,
    TrainedNetwork,
    build_model,
    model_spec,
    restore_rule,
    rule_credit,
    train,
)
from ..zoo.graphed_steps import recording_stream, stream_of_thread
from ..zoo.residual_contract import anatomy_of
from ..zoo.rules import rule_class
from .progress import StudyProgress
from .records import AuditedStep, RunRecord, StudyResult, step_from_dict, step_to_dict, with_frozen
from .suites import StudyModel, Suite

# Changes whenever an audit's figures change their meaning; older ones are then made anew.
AUDIT_VERSION = 1

TRAINED, FAILED = "trained", "failed"

# Runs at a time on a GPU: small networks leave most of it idle, and more threads than these wait
# for the interpreter's lock.
CUDA_JOBS = 8
# CUDA's streams come from a pool of so many; two runs on one stream would record each other.
MOST_CUDA_JOBS = 32


@dataclass(frozen=True)
class _Plan:
    """One run to be made: what it is, and where it goes."""

    model: StudyModel
    rule: str
    penalty: float
    seed: int
    steps: int
    marks: tuple[int, ...]
    config: dict[str, Any]
    folder: Path

    @property
    def key(self) -> str:
        return _hash(self.config)

    @property
    def name(self) -> str:
        return "/".join(self.folder.parts[-3:])

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step_{step}.pt"

    @property
    def resume(self) -> Path:
        return self.folder / "resume.pt"


def run_study(
    suite: Suite,
    dataset: ImageDataset,
    out: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    jobs: int | None = None,
    progress: Callable[[StudyProgress], None] | None = None,
) -> StudyResult:
    """Train and audit every run of a suite that is not done yet, and return all of them.

    Args:
        suite: what to run.
        dataset: the images; its test set must hold the suite's evaluation batches. On a GPU they
            are copied there once, for all runs.
        out: the study's folder, made if need be; see the module's docstring.
        device: where to train and audit. It is not part of a run's configuration.
        jobs: runs at a time; None takes 8 on CUDA and 1 elsewhere. Figures do not depend on it. A
            run that finds no memory beside others is tried again alone, after them.
        progress: called with a :class:`StudyProgress`, about a hundred times during a run's
            training and at its end; by one thread at a time.

    Returns the runs. Whatever a run raises becomes its ``reason``, and the others go on; it is
    tried again by the next call. Where a call is interrupted the next one makes the same figures,
    going on from the last checkpoint of each run that was stopped. Figures are over the model's own
    sample reduction: the class token in a transformer, as the protocol reads it, all features
    elsewhere. (d) compares with the frozen run of the same model and seed at the same step, so that
    both had the same training. On CUDA convolutions are computed by repeatable algorithms for as
    long as this runs.

    Raises ValueError, before anything is trained, where the folder holds runs of another
    configuration, the test set is too small or ``jobs`` is out of range. Source: 'Beyond Accuracy
    and Alignment' protocol, arXiv 2606.21126.
    """
    folder, device = Path(out), torch.device(device)
    on_cuda = device.type == "cuda"
    most = MOST_CUDA_JOBS if on_cuda else math.inf
    if jobs is None:
        jobs = CUDA_JOBS if on_cuda else 1
    if not 1 <= jobs <= most:
        upto = f" to {MOST_CUDA_JOBS}" if on_cuda else " upwards"
        raise ValueError(f"run_study: expected jobs from 1{upto}, got {jobs}")
    dataset.eval_batches(suite.eval_batch_size, suite.eval_batches)  # raises if it is too small
    plans = _plans(suite, dataset, folder)
    for plan in plans:
        _check_same_configuration(plan)
    if on_cuda:
        dataset = dataset.to(device)
        # The runs' streams do not wait for this one.
        torch.cuda.current_stream(device).synchronize()
    study = _Study(suite, dataset, device, _Clock(plans, progress, jobs))
    # Seeds go first: after one seed of everything the time left is known.
    order = sorted(plans, key=lambda plan: suite.seeds.index(plan.seed))
    with _repeatable_convolutions(device):
        if jobs == 1:
            found = {plan.name: study.run(plan) for plan in order}
        else:
            found = _run_together(study, order, jobs)
    runs = [found[plan.name] for plan in plans]
    return StudyResult(
        suite,
        dataset.name,
        dataset.num_classes,
        max(1, len(dataset.train_labels) // suite.batch_size),
        tuple(with_frozen(runs)),
        study.trained,
        folder,
    )


@contextmanager
def _repeatable_convolutions(device: torch.device) -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _run_together(study: _Study, plans: Sequence[_Plan], jobs: int) -> dict[str, RunRecord]:
    """Make the runs on threads; one that found no memory beside the others is made alone."""
    # Optimisers import the compiler at first use; two threads at once would see half of it.
    importlib.import_module("torch._dynamo")
    found: dict[str, RunRecord] = {}

    def run(plan: _Plan) -> RunRecord | None:
        on_cuda = study.device.type == "cuda"
        # Nothing of a run goes through the default stream, where one would wait for another.
        own = torch.cuda.stream(stream_of_thread(study.device)) if on_cuda else nullcontext()
        with own:
            try:
                return study.run(plan, alone=False)
            except torch.OutOfMemoryError:
                return None

    # A thread that repeats its step asks for the interpreter thousands of times a second, beside
    # others that audit in Python.
    with prompt_switches(), ThreadPoolExecutor(jobs, thread_name_prefix="study") as pool:
        futures = {pool.submit(run, plan): plan for plan in plans}
        try:
            for future in as_completed(futures):
                record = future.result()
                if record is not None:
                    found[futures[future].name] = record
        except BaseException:
            # Ctrl-C reaches the main thread alone. What is finished is on disk.
            study.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for plan in plans:
        if plan.name not in found:
            found[plan.name] = study.run(plan)
    return found


@dataclass
class _Study:
    """What the runs of a study share."""

    suite: Suite
    dataset: ImageDataset
    device: torch.device
    clock: _Clock
    stopped: threading.Event = field(default_factory=threading.Event)
    trained: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, plan: _Plan, *, alone: bool = True) -> RunRecord:
        """Make one run, or read it where it is done.

        Beside others, not ``alone``, OutOfMemoryError is passed on: it is not the run's own fault.
        """
        self.check_stopped()
        record = _read(plan.folder / "run.json")
        kept = _is_done(plan, record)
        if not kept:
            record = _train_run(plan, self, alone)
            with self.lock:
                self.trained += record["status"] == TRAINED
        # Here rather than after training, so that one left by a call that was killed goes too.
        plan.resume.unlink(missing_ok=True)
        run = _audited(plan, record, self, alone)
        self.clock.finished(plan, "failed" if run.reason else "kept" if kept else "audited")
        return run

    def check_stopped(self) -> None:
        if self.stopped.is_set():
            raise KeyboardInterrupt


def _plans(suite: Suite, dataset: ImageDataset, folder: Path) -> list[_Plan]:
    data = _fingerprint(dataset)
    plans = []
    for model in suite.models:
        steps = suite.steps_of(model, len(dataset.train_labels))
        for rule in suite.rules:
            # Blocks that stay as they are have no local loss to add a penalty to.
            penalties = (0.0,) if rule == "frozen" else suite.penalties
            for penalty in penalties:
                name = re.sub(r"[^A-Za-z0-9._-]+", "-", rule)
                name += f"+penalty_{penalty:g}" if penalty else ""
                for seed in suite.seeds:
                    marks = suite.marks_of(steps)
                    config = {
                        "model": model.model,
                        "model_options": dict(model.options),
                        "rule": rule,
                        "rule_options": dict(suite.rule_options.get(rule, {})),
                        "penalty": float(penalty),
                        "seed": seed,
                        "data": data,
                        "steps": steps,
                        "checkpoint_steps": list(marks),
                        "batch_size": suite.batch_size,
                        "learning_rate": float(suite.learning_rate),
                        "weight_decay": float(suite.weight_decay),
                    }
                    if model.random_targets:
                        config["random_targets"] = True
                    if (version := _rule_version(rule)) > 1:
                        config["rule_version"] = version
                    # As JSON gives it back, tuples as lists, so that it can be compared.
                    config = json.loads(json.dumps(config))
                    place = folder / model.label / name / f"seed_{seed}"
                    plans.append(
                        _Plan(model, rule, float(penalty), seed, steps, marks, config, place)
                    )
    return plans


def _rule_version(rule: str) -> int:
    try:
        return rule_class(rule).version
    except Exception:  # what is wrong with it stands in its runs
        return 1


def _fingerprint(dataset: ImageDataset) -> dict[str, Any]:
    """Tell data sets apart, without reading all of a large one's pixels."""
    digest = hashlib.sha256()
    for tensor in (
        dataset.train_labels,
        dataset.test_labels,
        dataset.train_images[:64],
        dataset.test_images[:64],
    ):
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return {"name": dataset.name, "shape": list(dataset.input_shape), "sha256": digest.hexdigest()}


def _check_same_configuration(plan: _Plan) -> None:
    record = _read(plan.folder / "run.json")
    if record is None or record.get("status") != TRAINED or record.get("key") == plan.key:
        return
    before = record.get("config", {})
    changed = [name for name in plan.config if before.get(name) != plan.config[name]]
    what = "; ".join(
        f"{name}: expected {plan.config[name]}, got {before.get(name)}" for name in changed
    )
    raise ValueError(
        f"{plan.folder}: holds a run of another configuration ({what}): choose another --out, or "
        f"remove that folder"
    )


def _is_done(plan: _Plan, record: dict[str, Any] | None) -> bool:
    return (
        record is not None
        and record.get("status") == TRAINED
        and record.get("key") == plan.key
        and all(plan.checkpoint(step).is_file() for step in plan.marks)
    )


class _Clock:
    """Say how fast training is, and how long the rest will take; from any thread."""

    def __init__(
        self,
        plans: Sequence[_Plan],
        progress: Callable[[StudyProgress], None] | None,
        jobs: int,
    ) -> None:
        self.progress = progress
        self.jobs = jobs
        self.left = {plan.name: plan for plan in plans}
        self.total = len(plans)
        self.costs: dict[tuple[str, str], float] = {}
        # Of finished trainings: updates, and seconds of each added up.
        self.steps, self.seconds = 0, 0.0
        # While any run trained, and since when one does.
        self.wall, self.since = 0.0, 0.0
        # Of those that train: when they began, updates before that, updates so far.
        self.running: dict[str, tuple[float, int, int]] = {}
        self.lock = threading.RLock()

    def start(self, plan: _Plan, before: int = 0) -> None:
        with self.lock:
            now = time.perf_counter()
            if not self.running:
                self.since = now
            self.running[plan.name] = now, before, before

    def training(self, plan: _Plan, done: int) -> None:
        with self.lock:
            self.running[plan.name] = *self.running[plan.name][:2], done
            self._say(plan, "training", done)

    def seconds_of(self, plan: _Plan) -> float:
        """Return for how long a run has trained in this call."""
        with self.lock:
            return time.perf_counter() - self.running[plan.name][0]

    def stop(self, plan: _Plan, *, trained: bool) -> float:
        """Take note of a training's end and return its seconds."""
        with self.lock:
            now = time.perf_counter()
            began, before, _ = self.running.pop(plan.name)
            seconds = now - began
            if not self.running:
                self.wall += now - self.since
            if trained:
                made = plan.steps - before
                self.costs[plan.model.label, plan.rule] = seconds / made
                self.steps, self.seconds = self.steps + made, self.seconds + seconds
            return seconds

    def finished(self, plan: _Plan, state: str) -> None:
        with self.lock:
            del self.left[plan.name]
            self._say(plan, state, plan.steps)

    def _say(self, plan: _Plan, state: str, done: int) -> None:
        if self.progress is None:
            return
        now = time.perf_counter()
        steps = self.steps + sum(done - before for _, before, done in self.running.values())
        busy = self.seconds + sum(now - began for began, _, _ in self.running.values())
        wall = self.wall + (now - self.since if self.running else 0.0)
        average = busy / steps if steps else 0.0
        left = [
            self.costs.get((other.model.label, other.rule), average)
            * (other.steps - self.running.get(name, (0.0, 0, 0))[2])
            for name, other in self.left.items()
        ]
        self.progress(
            StudyProgress(
                plan.name,
                state,
                self.total - len(self.left),
                self.total,
                done,
                plan.steps,
                steps / wall if wall else 0.0,
                # The longest run cannot be shared out.
                max([sum(left) / self.jobs, *left]),
            )
        )


def _train_run(plan: _Plan, study: _Study, alone: bool) -> dict[str, Any]:
    """Train one run, keep its checkpoints and return its record, also of a failure."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    environment = _environment(study.device)
    record: dict[str, Any] = {
        "key": plan.key,
        "config": plan.config,
        "environment": environment,
    }
    clock = study.clock
    saved = _read_resume(plan, environment)
    network = None
    try:
        if saved is not None:
            with suppress(CannotResume):
                network = _train_from(saved, plan, study, environment)
        if network is None:
            saved = None
            network = _train_from(None, plan, study, environment)
    except Exception as error:  # whatever a rule raises is its run's failure, not the study's
        if isinstance(error, torch.OutOfMemoryError) and not alone:
            raise
        record |= {"status": FAILED, "reason": first_line(error, named=True)}
    finally:
        seconds = clock.stop(plan, trained=network is not None)
    if network is not None:
        before = 0.0 if saved is None else saved["seconds"]
        record |= {
            "status": TRAINED,
            "seconds": round(before + seconds, 3),
            "graphed_steps": network.graphed_steps,
            "graph_note": network.graph_note,
        }
    _write(plan.folder / "run.json", record)
    return record


def _train_from(
    saved: dict[str, Any] | None, plan: _Plan, study: _Study, environment: str
) -> TrainedNetwork:
    """Train one run from what its ``resume.pt`` held, or from its first step."""
    done, seconds = (0, 0.0) if saved is None else (_steps_in(saved), saved["seconds"])
    study.clock.start(plan, done)
    kept = {plan.checkpoint(step) for step in plan.marks if step <= done}
    # What a stopped run left would stand beside the new one's, perhaps at other steps. Without the
    # first of these nothing goes on from what is left of the others.
    if saved is None:
        plan.resume.unlink(missing_ok=True)
    for pattern in ("run.json", "audit.json", "step_*.pt"):
        for old in plan.folder.glob(pattern):
            if old not in kept:
                old.unlink(missing_ok=True)

    def keep(step: int, network: TrainedNetwork) -> None:
        save_checkpoint(network.checkpoint(), plan.checkpoint(step))
        if step == plan.steps:
            return
        # What a rule of one's own has may not be for saving: that costs a second start, not a run.
        with suppress(Exception):
            state = {
                "key": plan.key,
                "environment": environment,
                "seconds": seconds + study.clock.seconds_of(plan),
                "training": network.training_state(),
            }
            save_checkpoint(state, plan.resume)

    suite, dataset = study.suite, study.dataset
    if plan.model.random_targets:
        dataset = dataset.with_random_targets(plan.seed)
    return train(
        plan.model.model,
        plan.rule,
        dataset,
        steps=plan.steps,
        batch_size=suite.batch_size,
        seed=plan.seed,
        learning_rate=suite.learning_rate,
        weight_decay=suite.weight_decay,
        penalty=plan.penalty,
        model_options=plan.model.options,
        rule_options=suite.rule_options.get(plan.rule, {}),
        device=study.device,
        progress=lambda done, total, loss: study.clock.training(plan, done),
        checkpoint_steps=plan.marks,
        on_checkpoint=keep,
        stop=study.stopped.is_set,
        resume=None if saved is None else saved["training"],
    )


def _read_resume(plan: _Plan, environment: str) -> dict[str, Any] | None:
    """Return what a stopped run goes on from, None where it has to start at its first step."""
    try:
        saved = torch.load(plan.resume, map_location="cpu", weights_only=True)
        done = _steps_in(saved)
        fits = (
            (saved["key"], saved["environment"]) == (plan.key, environment)
            # One that failed is over; its rule is another by now, perhaps.
            and not (plan.folder / "run.json").exists()
            and all(plan.checkpoint(step).is_file() for step in plan.marks if step <= done)
            and 0 <= saved["seconds"] < math.inf
        )
    except Exception:  # none there, or one that is damaged
        return None
    return saved if fits else None


def _steps_in(saved: Mapping[str, Any]) -> int:
    return len(saved["training"]["losses"])


def _audited(plan: _Plan, record: dict[str, Any] | None, study: _Study, alone: bool) -> RunRecord:
    """Return one run with the figures of its checkpoints, from ``audit.json`` if they are there."""
    assert record is not None
    run = RunRecord(plan.model.label, plan.model.variant, plan.rule, plan.penalty, plan.seed)
    if record["status"] != TRAINED:
        return replace(run, reason=str(record["reason"]))
    run = replace(
        run,
        seconds=float(record.get("seconds", 0.0)),
        environment=str(record.get("environment", "")),
    )
    shape = [study.suite.eval_batches, study.suite.eval_batch_size]
    key = _hash({"run": plan.key, "batches": shape, "version": AUDIT_VERSION})
    path = plan.folder / "audit.json"
    audit = _read(path)
    known = _steps_of(audit, key)
    if known is None:
        try:
            steps = _audit(plan, study)
        except Exception as error:  # a checkpoint damaged meanwhile, or one that fits no probe
            if isinstance(error, torch.OutOfMemoryError) and not alone:
                raise
            return replace(run, reason=f"audit: {first_line(error, named=True)}")
        audit = {"key": key, "steps": [step_to_dict(step) for step in steps]}
        _write(path, audit)
        # Through JSON also where it was made just now: a later call then sees the same figures.
        known = tuple(step_from_dict(plain(step)) for step in audit["steps"])
    return replace(run, steps=known)


def _steps_of(audit: Mapping[str, Any] | None, key: str) -> tuple[AuditedStep, ...] | None:
    """Return the steps of an audit that was kept; None for another's, or a damaged one."""
    if audit is None or audit.get("key") != key:
        return None
    try:
        return tuple(step_from_dict(plain(step)) for step in audit["steps"])
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _audit(plan: _Plan, study: _Study) -> list[AuditedStep]:
    """Audit a run's checkpoints, one after another in one network."""
    with recording_stream(study.device):
        model = build_model(
            plan.model.model,
            input_shape=study.dataset.input_shape,
            num_classes=study.dataset.num_classes,
            seed=0,
            **dict(plan.model.options),
        )
        model = model.to(study.device).eval()
        steps = []
        for step in plan.marks:
            study.check_stopped()
            steps.append(_audit_checkpoint(plan, step, model, study))
        return steps


def _audit_checkpoint(plan: _Plan, step: int, model: nn.Module, study: _Study) -> AuditedStep:
    checkpoint = load_checkpoint(plan.checkpoint(step))
    load_into(model, checkpoint)
    # Views, where the images lie on the device.
    batches = study.dataset.eval_batches(
        study.suite.eval_batch_size,
        study.suite.eval_batches,
        flatten=model_spec(plan.model.model).flatten_input,
        device=study.device,
    )
    report = diagnose(
        model,
        batches,
        checkpoint.extra["config"]["accuracy"],
        test_size=len(study.dataset.test_labels),
        reduction=anatomy_of(model).credit_reduction,
    )
    credit = None
    if step == plan.steps:
        try:
            rule = restore_rule(model, checkpoint.extra, rule_name=plan.rule)
        except (ValueError, TypeError) as error:
            credit = CreditReport(reason=str(error))
        else:
            # The null costs twenty times as much again, and no table of a study has it.
            credit = rule_credit(rule, batches[0], fresh=None)
    return AuditedStep(step, report.figures, credit)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _environment(device: torch.device) -> str:

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{platform.machine()} {device.type}, {threads} thread{'s' if threads > 1 else ''}"
    return f"fadiag_fast {__version__}, torch {torch.__version__}, {name}"


def _read(path: Path) -> dict[str, Any] | None:
    """Return a record, None where there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(strict(dict(record)), indent=1, ensure_ascii=False) + "\n"
    write_whole(path, text, sync=True)
