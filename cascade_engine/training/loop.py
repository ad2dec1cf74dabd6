"""The training loop: phases, batches, steps, read top to bottom."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from cascade_engine.errors import InvalidInput
from cascade_engine.training import checkpoint
from cascade_engine.training.batches import SPOILT, Batch, batches_per_epoch, training_rows
from cascade_engine.training.config import TrainConfig
from cascade_engine.training.data import augmentation, open_cache
from cascade_engine.training.desk import Desk, Report
from cascade_engine.training.extraction import write_features
from cascade_engine.training.interruption import Interruption
from cascade_engine.training.journal import Journal
from cascade_engine.training.objective import Contrast, Outcome
from cascade_engine.training.parallel import World, average_statistics, gather, joined, sum_gradients, summed, wait
from cascade_engine.training.phases import judge_mining, make_initial
from cascade_engine.training.run import INITIAL, Run
from cascade_engine.training.state import PhaseState
from cascade_engine.video.augment import Augment
from cascade_engine.video.cache import ClipCache


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    cache: ClipCache | None = None,
    augment: Augment | None = None,
    report: Report | None = None,
) -> Run:
    """Train as a config says: phase by phase, each ending with a sealed phase of features in the run's store.

    Under ``torchrun`` the processes train as one. Ctrl-C and SIGTERM finish the step, save, and raise.

    Args:
        config: the run.
        resume: go on with the run of that name where its last checkpoint is; a run that does not exist is begun.
        cache: the videos, instead of those that the config names.
        augment: makes training clips, instead of what the config says.
        report: called after every step of the first process.

    Returns:
        The run, complete.

    Raises:
        InvalidInput: the run exists already and is not to be resumed, or was begun with another config or other videos;
            or a phase of a new run would end before its bank is full enough to mine in.
        CheckpointError: what is to be resumed does not fit.
        CascadeError: another process was lost.
        KeyboardInterrupt: interrupted; the last step is saved.

    Source: METHOD blocks 900, 910, 920.
    """
    with ExitStack() as stack:
        world = stack.enter_context(joined())
        device = prepare(config, world)
        if device.type == "cpu" and config.optim.precision == "bfloat16":
            # oneDNN's bfloat16 weight gradient of a (3, 1, 1) convolution over two frames is garbage (torch 2.15)
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        begun = find(config, resume=resume)
        cache = cache or open_cache(config, world)
        augment = augment or augmentation(config)
        videos = len(training_rows(cache, config))
        per_epoch = batches_per_epoch(videos, config, world)
        judge_mining(config, videos, per_epoch, refuse=begun is None)
        run = begin(config, cache, begun, world)
        held = checkpoint.newest(run.checkpoints)
        saved = checkpoint.load(held) if held else None
        desk = Desk(run=run, world=world, report=report, interruption=stack.enter_context(Interruption()))
        if world.first:
            run.note_data(cache)
            done = sum(phase.epochs for phase in config.phase if phase.name in run.phases) * per_epoch
            reached = max(done, saved["step"] if saved else 0)
            desk.journal = Journal(run.folder, config.output, config.name, reached)
            stack.callback(desk.journal.close)
        for number, phase in enumerate(config.phase):
            if phase.name not in run.phases:
                state = PhaseState(run, number, cache, augment, world, device)
                if saved and saved["state"]["phase"] == phase.name:
                    state.load_state_dict(saved["state"], str(held))
                train_phase(state, desk, device)
                average_statistics([state.encoder], world)
                if world.first:
                    run.save_encoders(phase.name, {phase.train: state.encoder})
                wait(world)
            write_features(run, phase.name, cache, world, device)
            desk.before += phase.epochs * per_epoch
    return run


def prepare(config: TrainConfig, world: World) -> torch.device:
    """Set threads and seeds; the device to train on.

    Raises:
        InvalidInput: a device that is not here.
    """
    if config.optim.threads:
        torch.set_num_threads(config.optim.threads)
    torch.manual_seed(config.seed)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    try:
        if str(device) == "cuda":  # each process one of its own
            device = torch.device("cuda", world.rank % max(1, torch.cuda.device_count()))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).partition("\n")[0]
        raise InvalidInput(f"device: {config.device!r} cannot be used here: {reason}") from None
    return device


def find(config: TrainConfig, *, resume: bool) -> Run | None:
    """The run to go on with; None where there is none yet."""
    folder = Path(config.output.runs) / config.name
    if not (folder / "config.toml").exists():
        return None
    if not resume:
        raise InvalidInput(f"run: {folder} holds a run already; resume it, or give this one another name")
    if Run.open(folder).config.course != config.course:
        raise InvalidInput(f"resume: {folder} was begun with another config; give this run another name")
    return Run(folder, config)


def begin(config: TrainConfig, cache: ClipCache, begun: Run | None, world: World) -> Run:
    """The run's folder: made by the first process, or there already and of the same videos."""
    folder = Path(config.output.runs) / config.name
    if begun is not None and (begun.phases or checkpoint.newest(begun.checkpoints)):
        begun.require_videos(cache.index)
    wait(world)  # all have looked
    if world.first:
        run = begun or Run.create(folder, config)
        if not run.phase_path(INITIAL).exists():
            make_initial(run)
    wait(world)
    return Run(folder, config)


def train_phase(state: PhaseState, desk: Desk, device: torch.device) -> None:
    """Train one phase from where `state` is to its end.

    Raises:
        KeyboardInterrupt: the desk was asked to stop; the last step is saved.
    """
    desk.begin(state)
    for batch in state.batches.loader(state.item):
        set_rate(state)
        contrast, outcome = forward(state, batch, desk.world, device)
        count = accumulated(state)
        weight = outcome.counted / joint_count(state, batch, outcome, desk.world) / count
        (outcome.loss * weight).backward()  # type: ignore[no-untyped-call]
        desk.count(state, batch, contrast, outcome, weight)
        enqueue(state, batch)  # after the loss, and after its backward pass: both read the bank
        state.item += 1
        if count > 1 and state.item % state.config.optim.accumulate and state.item < len(state.batches):
            continue
        told = sum_gradients(state.encoder, desk.tell(), desk.world)
        update(state)
        desk.after_step(state, told)


def forward(state: PhaseState, batch: Batch, world: World, device: torch.device) -> tuple[Contrast, Outcome]:
    """Encode a batch, find its positives, and contrast."""
    state.keys, spoilt = encode_keys(state, batch, world, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=state.config.optim.precision == "bfloat16"):
        query = state.encoder(batch.query.to(device))
    rows = batch.rows[batch.own]
    contrast = Contrast(
        query=query,
        keys={view: keys[batch.own] for view, keys in state.keys.items()},
        video_id=rows.to(device),
        label=torch.from_numpy(state.label)[rows].to(device),
        spoilt=spoilt,
        companions=state.keys if state.config.loss.in_batch else None,
        companion_id=batch.rows.to(device),
        first=batch.own.start,
        joint=len(batch.rows),
    )
    drop: torch.Generator | None = None
    if not isinstance(state.config.loss.self_positive, str):
        place = np.random.SeedSequence([state.config.seed, state.number, state.item, 0])  # alike in all processes
        drop = torch.Generator(device).manual_seed(int(place.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    return contrast, state.objective(contrast, state.bank.bank(), mining=state.mining, generator=drop)


def joint_count(state: PhaseState, batch: Batch, outcome: Outcome, world: World) -> int:
    """Queries of the joint batch that have a positive, at least 1: what the sum of all losses is divided by."""
    if state.config.loss.self_positive != "never":
        return len(batch.rows)
    return max(1, int(summed(np.array([outcome.counted]), world)[0]))


@torch.no_grad()
def encode_keys(
    state: PhaseState, batch: Batch, world: World, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The keys of the whole batch, view to (B, D) in the order of its rows, and its spoilt clips' embeddings.

    They are encoded in another order than the queries, so that batch norm's groups differ (see `models.norm`).
    """
    back = batch.order.argsort().to(device)
    keys, spoilt = dict[str, torch.Tensor](), list[torch.Tensor]()
    for name, clips in batch.keys.items():
        encoder = state.oracles.get(name, state.momentum)
        with torch.autocast(device.type, torch.bfloat16, enabled=state.config.optim.precision == "bfloat16"):
            encoded = encoder(clips.to(device))
        encoded = gather(encoded, len(batch.rows), world)[back]
        if name.startswith(SPOILT):
            spoilt.append(encoded)
        else:
            keys[name] = encoded
    return keys, torch.cat(spoilt) if spoilt else None


def enqueue(state: PhaseState, batch: Batch) -> None:
    """Push the batch's keys of all views; labels go along for metrics and the supervised bound only."""
    rows = batch.rows.to(next(iter(state.keys.values())).device)
    state.bank.push(state.keys, rows, rows, torch.from_numpy(state.label)[batch.rows].to(rows.device))


def accumulated(state: PhaseState) -> int:
    """Batches in the optimiser step that the next batch belongs to; the last step of a phase may have fewer."""
    each = state.config.optim.accumulate
    return min(each, len(state.batches) - state.item // each * each)


def update(state: PhaseState) -> None:
    """One step of the optimiser; the momentum encoder follows."""
    if state.config.optim.clip_norm:
        torch.nn.utils.clip_grad_norm_(state.encoder.parameters(), state.config.optim.clip_norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.momentum.follow(state.encoder)


def set_rate(state: PhaseState) -> None:
    """Set the learning rate of the batch that comes."""
    warm = state.phase.warmup * state.batches.per_epoch
    rate = state.phase.lr * schedule(state.phase.schedule, state.item / len(state.batches))
    if state.item < warm:
        rate *= (state.item + 1) / (warm + 1)
    for group in state.optimizer.param_groups:
        group["lr"] = rate


def schedule(name: str, done: float) -> float:
    """The share of the highest learning rate after `done` of a phase, in [0, 1)."""
    if name == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * done)
    if name == "steps":
        return 1.0 if done < 0.6 else 0.1 if done < 0.8 else 0.01
    return 1.0
