"""The codec's training run: crops of speech, the loop, checkpoints and curves."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from csm_jax.array_typing import Array
from csm_jax.config import SAMPLE_RATE
from csm_jax.corpus.files import place
from csm_jax.mimi import training
from csm_jax.mimi.spectral_loss import spectral_loss
from csm_jax.mimi.training import TrainingConfig, TrainState
from csm_jax.train.log import LOG_NAME, Log
from csm_jax.weights.mimi import save_mimi
from recipes.demo_voice import curves
from recipes.demo_voice.codec_plan import Crops, Plan, load_clips

RUN_NAME, STATE_NAME, CODEC_NAME = "run.json", "state.safetensors", "codec.safetensors"

_LOG_STEPS = 20
_DEV_BATCHES = 4
_START = 1 << 30  # a step's number that no step has


class Stopped(Exception):
    """The run was asked to stop, and is saved."""


class RunError(ValueError):
    """The directory holds another run."""


class DivergedError(RuntimeError):
    """The loss is no number any more."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train, in all: one of the two.

    Attributes:
        minutes: On the clock.
        steps: Steps.
    """

    minutes: float | None
    steps: int | None

    def share(self, steps: int, seconds: float) -> float:
        """Returns how much of the run is over, 1 at its end."""
        if self.steps is not None:
            return steps / self.steps
        return seconds / (60 * (self.minutes or 1e-9))


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run calls.

    Attributes:
        note: With a line about what happens.
        progress: With the steps made and their metrics, after each.
        stopping: Whether to save and stop.
    """

    note: Callable[[str], None]
    progress: Callable[[int, dict[str, Any]], None]
    stopping: Callable[[], bool]


# --- the run ------------------------------------------------------------------------------------


def train(directory: Path, out: Path, *, plan: Plan, budget: Budget, hooks: Hooks) -> Path:
    """Returns the finished codec's file.

    Args:
        directory: Speech (`recipes.demo_voice.speech`).
        out: The run's directory; a run in it is gone on with.
        plan: The run.
        budget: How long, in all.
        hooks: What is called.

    Raises:
        FileNotFoundError: There is no speech.
        RunError: `out` holds another run, or the budget is too small for a codec.
        DivergedError: The loss is no number any more.
        Stopped: `hooks.stopping` said so, and the run is saved.
        OSError: `out` cannot be written.
    """
    return _Run(directory, out, plan, budget, hooks).go()


class _Run:
    def __init__(
        self, directory: Path, out: Path, plan: Plan, budget: Budget, hooks: Hooks
    ) -> None:
        self.out, self.plan, self.budget, self.hooks = out, plan, budget, hooks
        out.mkdir(parents=True, exist_ok=True)
        clips = self._own_clips(directory)
        samples = plan.frames * plan.training.mimi.samples_per_frame
        self.crops = Crops(clips, samples=samples, seed=plan.seed)
        dev = load_clips(directory, "dev", most=None, hours=plan.hours)
        crops = Crops(dev, samples=samples, seed=plan.seed)
        self.dev = [jnp.asarray(crops.batch(number, plan.rows)) for number in range(_DEV_BATCHES)]
        self.key = jax.random.key(plan.seed)
        self.step = training.make_step(plan.training)

    def _own_clips(self, directory: Path) -> list[np.ndarray]:
        """Returns the speech the run began with, whatever has been made since, or more if asked for."""
        path, plan = self.out / RUN_NAME, self.plan
        run = json.loads(json.dumps(dataclasses.asdict(plan)))
        del run["checkpoint_s"]
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else run
        same_speech = before["hours"] == plan.hours
        most = before.get("recordings") if same_speech else None
        clips = load_clips(directory, "train", most=most, hours=plan.hours)
        speech = {"recordings": len(clips), "samples": sum(map(len, clips))}
        self.hooks.note(
            f"{speech['samples'] / SAMPLE_RATE / 3600:.2f} h of speech in {len(clips):,} recordings"
        )
        compared = {**run, **speech} if same_speech and most is not None else run
        lines = [
            f"  {name}: {before.get(name)!r} there, {value!r} now"
            for name, value in compared.items()
            if before.get(name) != value and (same_speech or name != "hours")
        ]
        if lines and (self.out / STATE_NAME).exists():
            raise RunError(
                f"{self.out} holds another run, which cannot be gone on with as this one:\n"
                + "\n".join(lines)
                + "\nchoose another --out, or give the same arguments again"
            )
        place(path, json.dumps({**run, **speech}, indent=1).encode() + b"\n")
        return clips

    def go(self) -> Path:
        """Trains to the end of the budget."""
        state, made, seconds = self._begin()
        log = Log(self.out, step=made, tensorboard=False)
        saved, first = time.monotonic(), made
        mean = _Mean()
        try:
            while (share := self.budget.share(made, seconds)) < 1:
                begun = time.monotonic()
                if made == self.plan.unquantised_steps:
                    state = self._start_codebooks(state)
                audio = jnp.asarray(self.crops.batch(made, self.plan.rows))
                rate = self._rate(made, share)
                key = jax.random.fold_in(self.key, made)
                state, metrics = self.step(state, audio, jnp.float32(rate), key)
                values = {name: np.asarray(x).tolist() for name, x in metrics.items()}
                made += 1
                took = time.monotonic() - begun
                if made > first + 1:  # the first one compiles
                    seconds += took
                if not np.isfinite(values["loss"]):
                    raise DivergedError(
                        f"the loss is {values['loss']} at step {made:,}: give another --seed, or lower "
                        "the learning rates"
                    )
                values |= {"rate": rate, "speed": audio.size / SAMPLE_RATE / took}
                mean.add(values)
                self.hooks.progress(made, values | {"left_s": self._left(made, seconds, took)})
                stopping = self.hooks.stopping()
                over = self.budget.share(made, seconds) >= 1
                if stopping or over or time.monotonic() - saved >= self.plan.checkpoint_s:
                    log.write("train", made, mean.take() | {"seconds": seconds})
                    log.write("eval", made, self._evaluate(state))
                    self._save(state, seconds)
                    saved = time.monotonic()
                elif made % _LOG_STEPS == 0:
                    log.write("train", made, mean.take() | {"seconds": seconds})
                if stopping and not over:
                    raise Stopped(f"stopped and saved at step {made:,}")
        finally:
            log.close()
        if made <= self.plan.unquantised_steps:
            raise RunError(
                f"the budget ended at step {made:,}, before the codebooks start (after step "
                f"{self.plan.unquantised_steps:,}): give more --steps or --minutes"
            )
        return self.out / CODEC_NAME

    def _rate(self, step: int, share: float) -> float:
        rise = min((step + 1) / (self.plan.warmup_steps + 1), 1.0)
        return rise * min((1 - share) / self.plan.decay_share, 1.0)

    def _left(self, made: int, seconds: float, took: float) -> float:
        if self.budget.steps is not None:
            return (self.budget.steps - made) * took
        return 60 * (self.budget.minutes or 0.0) - seconds

    # --- what is not a step ---------------------------------------------------------------------

    def _begin(self) -> tuple[TrainState, int, float]:
        """Returns the state to go on from, its steps, and the seconds they took."""
        state = training.init_state(self.plan.training, self.key)
        path = self.out / STATE_NAME
        if not path.exists():
            return state, 0, 0.0
        state, seconds = read_state(path, state)
        made = int(state.step)
        self.hooks.note(f"going on from step {made:,}, {seconds / 60:.1f} min")
        return state, made, seconds

    def _start_codebooks(self, state: TrainState) -> TrainState:
        plan = self.plan
        batches = -(-plan.start_frames // (plan.rows * plan.frames))
        self.hooks.note(f"starting the codebooks from {batches * plan.rows * plan.frames:,} frames")
        return training.with_codebooks(
            state,
            [
                jnp.asarray(self.crops.batch(plan.unquantised_steps + number, plan.rows))
                for number in range(batches)
            ],
            jax.random.fold_in(self.key, _START),
            iterations=plan.kmeans_iterations,
            config=plan.training,
        )

    def _evaluate(self, state: TrainState) -> dict[str, Any]:
        """Returns the losses on the dev split, and the share of each codebook's codes seen there."""
        found = [_measure(state, audio, config=self.plan.training) for audio in self.dev]
        mean = _Mean()
        for parts, _ in found:
            mean.add({name: float(value) for name, value in parts.items()})
        codes = np.concatenate([np.asarray(codes) for _, codes in found]).reshape(
            -1, self.plan.training.mimi.num_codebooks
        )
        return mean.take() | {"codes_seen": [len(np.unique(column)) for column in codes.T]}

    def _save(self, state: TrainState, seconds: float) -> None:
        place(self.out / STATE_NAME, state_bytes(state, seconds))
        if int(state.step) > self.plan.unquantised_steps:  # else it has no codebooks yet
            save_mimi(
                self.out / CODEC_NAME,
                self.plan.training.mimi,
                training.mimi_params(state),
                layout="moshi",
                overwrite=True,
            )
        draw_curves(self.out)


@functools.partial(jax.jit, static_argnames="config")
def _measure(
    state: TrainState, audio: Array, *, config: TrainingConfig
) -> tuple[dict[str, Array], Array]:
    """Returns the losses of reconstructed speech, and its codes."""
    wanted = training.as_float(audio)
    made, codes = training.reconstruct(state, wanted, config=config.mimi)
    total, parts = spectral_loss(made, wanted, config=config.spectral)
    return parts | {"spectral": total}, codes


class _Mean:
    """Means of numbers, and of lists of them, since they were last taken."""

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}

    def add(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def take(self) -> dict[str, Any]:
        means = {name: np.mean(all_, axis=0).tolist() for name, all_ in self._values.items()}
        self._values.clear()
        return means


# --- files --------------------------------------------------------------------------------------


def state_bytes(state: TrainState, seconds: float) -> bytes:
    """Returns a checkpoint as the bytes of a safetensors file."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    tensors = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return save(tensors, metadata={"seconds": repr(seconds)})


def read_state(path: Path, like: TrainState) -> tuple[TrainState, float]:
    """Returns a checkpoint, and the seconds of training before it.

    Args:
        path: What `state_bytes` gave.
        like: A state of the same shapes.

    Raises:
        RunError: It holds other values than `like`.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(name) for name, _ in leaves]
    with safe_open(path, framework="numpy") as file:
        if set(file.keys()) != set(names):
            raise RunError(f"{path} is a checkpoint of another program: choose another --out")
        seconds = float(file.metadata()["seconds"])
        arrays = [jnp.asarray(file.get_tensor(name)) for name in names]
    return jax.tree.unflatten(structure, arrays), seconds


def draw_curves(out: Path) -> None:
    """Draws a run's log as `curves.png`."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (out / LOG_NAME).read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    *axes, axis = figure.subplots(2, 3).flat
    names = ("convergence", "log", "mel", "semantic", "commitment")
    for each, name in zip(axes, names, strict=True):
        curves.plot(each, lines, name, title=name)
    for codebook, values in enumerate(zip(*(line["perplexity"] for line in trained), strict=True)):
        axis.plot([line["step"] for line in trained], values, label=str(codebook), linewidth=1)
    axis.set(title="perplexity of each codebook", xlabel="step")
    axis.legend(fontsize=7, ncols=2)
    curves.write(figure, out)
