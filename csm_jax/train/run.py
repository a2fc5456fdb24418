"""A training run from its settings to its weights: load, go on where it was, step, save, export.

Whatever stops it (Ctrl-C, SIGTERM, a preemption notice, a kill), the same settings go on from the last
checkpoint, and the weights it ends with are bit for bit those of a run that nothing stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from csm_jax import sharding
from csm_jax.array_typing import Params, PyTree
from csm_jax.config import default_dtype
from csm_jax.model import init_params, num_params, param_shardings
from csm_jax.prompt import check_text
from csm_jax.train.augment import AugmentConfig
from csm_jax.train.checkpoints import Checkpoints, alone, check_run, hash_weights, open_run
from csm_jax.train.export import export
from csm_jax.train.hooks import DivergedError, Hooks, Stopped
from csm_jax.train.inputs import find_model, open_data
from csm_jax.train.log import Log, has_line
from csm_jax.train.lora import LoraConfig
from csm_jax.train.loss import LossConfig
from csm_jax.train.meter import Meter, Work
from csm_jax.train.methods import Full, Lora, Method, Prefix, divide, trainable_shardings
from csm_jax.train.optimizer import OptimizerConfig, updates_made
from csm_jax.train.settings import LEARNING_RATES, WEIGHT_DECAYS, RunSettings
from csm_jax.train.step import (
    Metrics,
    StepConfig,
    TrainState,
    init_state,
    make_evaluation,
    make_step,
    place,
    summary,
)
from csm_jax.voices import check_name
from csm_jax.weights import tables

if TYPE_CHECKING:
    from csm_jax.train.samples import Sampler

_MOST_SKIPPED = 10  # steps in a row that were not finite
_BEGIN_AGAIN = "begin again in a new --output_dir with a lower --learning_rate"


def train(settings: RunSettings, hooks: Hooks | None = None) -> Path:
    """Returns the directory with the trained weights, `<output_dir>/final`.

    Raises:
        ValueError: A setting, the data or the model is bad, or the directory holds another run (`RunError`).
        OSError: Something cannot be read or written; what was saved before is whole.
        Stopped: `hooks.stopping` said so, or a preemption was announced.
        DivergedError: See there.
    """
    hooks = hooks or Hooks()
    with sharding.use_rules(sharding.TRAINING_RULES):
        mesh = None if settings.mesh is None else sharding.parse_mesh(settings.mesh)
        with sharding.on(mesh, sharding.current_rules()):
            return _Run(settings, hooks).go()


class _Run:
    """One run, on the mesh that is set."""

    def __init__(self, settings: RunSettings, hooks: Hooks) -> None:
        self.settings, self.hooks = settings, hooks
        self.begun = time.perf_counter()
        self.dtype = settings.dtype or default_dtype(jax.default_backend())
        self.config, self.source = find_model(settings)
        self.method = _method(settings)
        self.augmentation = _augmentation(settings)
        # What the end of a run takes, and its steps: not only when the data are ready.
        tables.get_layout(settings.export_layout)
        check_name(settings.voice_name)
        for text in settings.sample_text:
            check_text(text, "sample_text")
        self.step_config = self._step_config(steps=1)
        per_host = settings.per_device_train_batch_size * sharding.batch_multiple()
        if per_host % jax.process_count():
            raise ValueError(
                f"{per_host} rows of a micro-batch do not divide by {jax.process_count()} processes"
            )
        self.rows = per_host // jax.process_count()
        for path in (settings.train_file, settings.eval_file):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"{path}: there is no such file or directory")
        self.log: Log | None = None
        self.evaluate: Callable[..., Any] | None = None
        self.sampler: Sampler | None = None
        self.skipped = 0

    def go(self) -> Path:
        """Returns the directory of the exported weights."""
        with alone(self.settings.output_dir):
            return self._go()

    def _go(self) -> Path:
        settings, hooks = self.settings, self.hooks
        description = self._description()
        check_run(settings.output_dir, description)
        self.data = open_data(settings, settings.train_file, "train", self.config, hooks)
        self.eval_data = None
        if settings.eval_file is not None:
            self.eval_data = open_data(settings, settings.eval_file, "eval", self.config, hooks)
        self.steps = self._count_steps()
        self.step_config = self._step_config(steps=self.steps)
        description |= {"steps": self.steps, "train_data": self.data.fingerprint}
        check_run(settings.output_dir, description)
        state, frozen, origin = self._load()
        open_run(settings.output_dir, description | {"weights": origin})
        checkpoints = Checkpoints(settings.output_dir, keep=settings.save_total_limit)
        try:
            batches = self.data.batches(
                seed=settings.seed,
                epochs=self._epochs(),
                rows=self.rows,
                accumulation=settings.gradient_accumulation_steps,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            with contextlib.closing(batches):
                state, made = self._resume(checkpoints, state, batches)
                if jax.process_index() == 0:
                    self.log = Log(settings.output_dir, step=made, tensorboard=settings.tensorboard)
                state = self._loop(state, frozen, batches, checkpoints, made)
            self._check(state)
            hooks.note("writing the trained weights")
            if jax.process_count() > 1:
                state, frozen = _whole(state), _whole(frozen)
            return export(
                settings,
                self.config,
                self.method,
                state.trainable,
                frozen,
                data=self.data,
                note=hooks.note,
            )
        finally:
            if self.log is not None:
                self.log.close()
            checkpoints.close()

    # --- before the first step ------------------------------------------------------------------

    def _count_steps(self) -> int:
        s = self.settings
        if s.max_steps is not None:
            return s.max_steps
        return self.data.steps(
            seed=s.seed, epochs=s.num_train_epochs, rows_per_step=self._rows_per_step()
        )

    def _rows_per_step(self) -> int:
        return self.rows * jax.process_count() * self.settings.gradient_accumulation_steps

    def _epochs(self) -> int:
        # With a number of steps given, as many epochs as they may take: one holds a row at least.
        given = self.settings.max_steps
        return self.settings.num_train_epochs if given is None else given * self._rows_per_step()

    def _step_config(self, *, steps: int) -> StepConfig:
        s = self.settings
        rate = LEARNING_RATES[s.kind] if s.learning_rate is None else s.learning_rate
        decay = WEIGHT_DECAYS[s.kind] if s.weight_decay is None else s.weight_decay
        return StepConfig(
            model=self.config,
            method=self.method,
            loss=LossConfig(
                amortization_ratio=s.amortization_ratio,
                decoder_loss_weight=s.decoder_loss_weight,
                remat=s.remat,
                augmentation=self.augmentation,
            ),
            optimizer=OptimizerConfig(
                optim=s.optim,
                learning_rate=rate,
                lr_scheduler_type=s.lr_scheduler_type,
                warmup_steps=math.ceil(s.warmup_ratio * steps) if steps > 1 else 0,
                max_steps=steps,
                weight_decay=decay,
                adam_beta1=s.adam_beta1,
                adam_beta2=s.adam_beta2,
                adam_epsilon=s.adam_epsilon,
                max_grad_norm=s.max_grad_norm,
            ),
            dtype=self.dtype,
            seed=s.seed,
        )

    def _description(self) -> dict[str, Any]:
        """Returns what is known of the run before its data and weights are."""
        mesh = sharding.current_mesh()
        return self.settings.deciding() | {
            "model": dataclasses.asdict(self.config),
            "computed_in": self.dtype,
            "rows": self.rows * jax.process_count(),
            "mesh": None if mesh is None else dict(mesh.shape),
        }

    def _load(self) -> tuple[TrainState, Params, str | None]:
        """Returns the first state, the frozen weights, and the hash of what was loaded."""
        settings, config, note = self.settings, self.config, self.hooks.note
        mesh, dtype = sharding.current_mesh(), self.dtype
        stored = "float32" if isinstance(self.method, Full) else dtype
        key, origin = jax.random.key(settings.seed), None
        if self.source is None:
            params = init_params(config, key, dtype=stored)
        else:
            from csm_jax import weights

            note(f"loading {settings.model_name_or_path}")
            _, params = weights.load_checkpoint(
                self.source, layout=settings.layout, dtype=stored, config=config
            )
            origin = hash_weights(params)
        trainable, frozen = divide(self.method, params, config=config, key=key, dtype=dtype)
        if mesh is not None:
            trainable = _put(trainable, trainable_shardings(self.method, mesh, config=config))
            frozen = _put(frozen, param_shardings(config, mesh)) if frozen else {}
        count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        note(
            f"training {count:,} of {num_params(config) + (count if frozen else 0):,} parameters "
            f"({settings.method}) for {self.steps:,} steps"
        )
        return init_state(trainable, self.step_config.optimizer), frozen, origin

    def _resume(
        self, checkpoints: Checkpoints, state: TrainState, batches: Any
    ) -> tuple[TrainState, int]:
        wanted, steps = self.settings.resume_from_checkpoint, checkpoints.steps()
        if wanted is None and not steps:
            return state, 0
        state, place = checkpoints.restore(steps[-1] if wanted is None else wanted, state)
        batches.restore(place)
        made = int(state.step)
        if later := checkpoints.drop_after(made):
            self.hooks.note(f"removed the checkpoints of later steps, {later}: they are made again")
        self.hooks.note(f"going on from step {made:,}")
        return state, made

    # --- the loop -------------------------------------------------------------------------------

    def _loop(
        self,
        state: TrainState,
        frozen: Params,
        batches: Any,
        checkpoints: Checkpoints,
        made: int,
    ) -> TrainState:
        settings, hooks = self.settings, self.hooks
        step = make_step(self.step_config)
        if self.eval_data is not None:
            self.evaluate = make_evaluation(self.step_config)
        if settings.sample_steps is not None:
            from csm_jax.train.samples import Sampler

            self.sampler = Sampler(settings, self.config, self.method, self.dtype)
        meter = Meter(self.config, settings)
        pending: tuple[Metrics, Work] | None = None
        saved = made

        def keep(metrics: Metrics) -> None:
            # Its line first: what a checkpoint has behind it has been told. While steps are skipped
            # none is made, so that those before stay.
            nonlocal pending, saved
            if pending is not None:
                self._tell(made, *pending, meter)
                pending = None
            if saved != made and (made == self.steps or not metrics["skipped"]):
                checkpoints.save(state, batches.state())
                saved = made

        stopping = self._asked() or self._look(state, frozen, made, self._missing(made))
        while made < self.steps and not stopping:
            batch = next(batches)
            work = meter.weigh(batch, fill=batches.fill)
            state, metrics = step(state, frozen, place(batch, accumulated=True))
            made += 1
            if meter.first_s is None:
                jax.block_until_ready(metrics)
                meter.first_s = time.perf_counter() - self.begun
                hooks.note(f"first step done {meter.first_s:.1f} s after the start")
                meter.restart()
            elif pending is not None:
                self._tell(made - 1, *pending, meter)
            pending = metrics, work
            stopping = _preempted(made) if jax.process_count() > 1 else hooks.stopping()
            if stopping or made % settings.save_steps == 0 or made == self.steps:
                keep(metrics)
            due = self._due(made)
            if any(due) and not stopping:
                jax.block_until_ready(metrics)
                meter.pause()
                stopping = self._look(state, frozen, made, due)
                meter.go_on()
                if stopping:
                    keep(metrics)
        checkpoints.wait()
        if stopping:
            raise Stopped(saved)
        return state

    def _asked(self) -> bool:
        # One of several processes cannot stop alone: those hear it together, after a step.
        return jax.process_count() == 1 and self.hooks.stopping()

    def _tell(self, step: int, metrics: Metrics, work: Work, meter: Meter) -> None:
        meter.add(work)
        values = {
            name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()
        }
        self.hooks.progress(step, self.steps, values)
        if self.log is not None and (step % self.settings.logging_steps == 0 or step == self.steps):
            self.log.write("train", step, values | meter.read())
        self.skipped = self.skipped + 1 if values["skipped"] else 0
        if self.skipped >= _MOST_SKIPPED:
            raise DivergedError(
                f"the gradient was not finite for {self.skipped} steps up to {step:,}, which "
                f"moved nothing: {_BEGIN_AGAIN}"
            )

    def _check(self, state: TrainState) -> None:
        """Checks that a run has come to something that may be exported."""
        finite = jax.jit(lambda tree: jnp.stack([jnp.isfinite(x).all() for x in tree]).all())
        if not finite(jax.tree.leaves(state.trainable)):
            raise DivergedError(f"the trained weights are not finite: {_BEGIN_AGAIN}")
        skipped = self.steps - updates_made(state.moments)
        if skipped == self.steps:
            raise DivergedError(
                f"the gradient was not finite in any of the {skipped:,} steps, and nothing "
                f"was trained: {_BEGIN_AGAIN}"
            )
        if skipped:
            self.hooks.note(
                f"in {skipped:,} of {self.steps:,} steps the gradient was not finite, and nothing moved"
            )

    # --- looking at it --------------------------------------------------------------------------

    def _due(self, made: int) -> tuple[bool, bool]:
        """Returns whether to evaluate and whether to speak after a step."""
        settings, steps = self.settings, self.steps
        return (
            self.evaluate is not None and _due(made, settings.eval_steps, steps),
            self.sampler is not None and _due(made, settings.sample_steps, steps),
        )

    def _missing(self, made: int) -> tuple[bool, bool]:
        """Returns what of it a run that goes on from a step has not got of that step."""
        if not made:
            return False, False
        evaluating, sampling = self._due(made)
        return (
            evaluating and not has_line(self.settings.output_dir, "eval", made),
            sampling and self.sampler is not None and not self.sampler.has(made),
        )

    def _look(self, state: TrainState, frozen: Params, made: int, due: tuple[bool, bool]) -> bool:
        """Evaluates and speaks; returns whether it was asked to stop before the end of that."""
        evaluating, sampling = due
        if evaluating and not self._evaluate(state, frozen, made):
            return True
        if sampling and self.sampler is not None:
            if self._asked():
                return True
            self.sampler.speak(made, state.trainable, frozen)
        return False

    def _evaluate(self, state: TrainState, frozen: Params, made: int) -> bool:
        """Returns whether it came to its end."""
        if self.eval_data is None or self.evaluate is None:
            return True
        sums, counts = None, None
        for batch in self.eval_data.eval_batches(
            rows=self.rows, process_index=jax.process_index(), process_count=jax.process_count()
        ):
            if self._asked():
                return False
            found = jax.device_get(
                self.evaluate(state.trainable, frozen, place(batch, accumulated=False))
            )
            found = jax.tree.map(np.float64, found)
            if sums is None:
                sums, counts = found
            else:
                sums, counts = jax.tree.map(np.add, (sums, counts), found)
        if sums is None or counts is None:
            return True
        values = summary(sums, counts, self.step_config.loss)
        values = {name: np.asarray(value).tolist() for name, value in values.items()}
        self.hooks.note(
            f"step {made:,}: eval loss {values['loss']:.4f} (c0 {values['c0']:.4f}, decoder "
            f"{values['decoder']:.4f}, eos_c0 {values['eos_c0']:.4f})"
        )
        if self.log is not None:
            self.log.write("eval", made, values)
        return True


def _method(settings: RunSettings) -> Method:
    if settings.method == "lora":
        lora = LoraConfig(rank=settings.lora_rank, alpha=settings.lora_alpha)
        return Lora(lora, quantize=settings.quantize)
    return Prefix(settings.prefix_positions) if settings.method == "prefix" else Full()


def _augmentation(settings: RunSettings) -> AugmentConfig | None:
    given = AugmentConfig(
        history_noise=settings.history_noise,
        noisy_share=settings.noisy_share,
        codebook_dropout=settings.codebook_dropout,
    )
    return given if given.history_noise or given.codebook_dropout else None


def _put(tree: PyTree, shardings: PyTree) -> PyTree:
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(x: Any, placement: Any) -> Any:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, placement, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def _whole(tree: PyTree) -> PyTree:
    return jax.jit(lambda tree: jax.tree.map(sharding.whole, tree))(tree)


def _due(step: int, every: int | None, last: int) -> bool:
    return step == last or (every is not None and step % every == 0)


def _preempted(step: int) -> bool:
    # All processes hear it at the same step; a key pressed at one of them only that one would hear.
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
