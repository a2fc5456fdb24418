"""A training run from its settings to its weights: load, go on where it was, step, save, export.

Whatever stops it (Ctrl-C, SIGTERM, a preemption notice, a kill), the same settings go on from the last
checkpoint, and the weights it ends with are bit for bit those of a run that nothing stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from csm_jax import config as csm_config
from csm_jax import sharding
from csm_jax.array_typing import Params, PyTree
from csm_jax.config import CSMConfig, default_dtype
from csm_jax.data.loader import TrainData
from csm_jax.model import init_params, num_params, param_shardings
from csm_jax.train.checkpoints import Checkpoints, open_run
from csm_jax.train.export import export
from csm_jax.train.log import Log
from csm_jax.train.lora import LoraConfig
from csm_jax.train.loss import LossConfig
from csm_jax.train.meter import Meter, Work
from csm_jax.train.methods import Full, Lora, Method, Prefix, divide, trainable_shardings
from csm_jax.train.optimizer import OptimizerConfig
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

_MOST_SKIPPED = 10  # steps in a row whose gradient is not finite


class Stopped(Exception):
    """A run was asked to stop and has saved where it was.

    Attributes:
        step: Of the checkpoint.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step:,}; the same command goes on from there")
        self.step = step


class DivergedError(RuntimeError):
    """The gradient has not been finite for many steps in a row."""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a run tells whom.

    Attributes:
        note: Called with a line for people.
        progress: Called after every step with (steps made, steps in all, metrics of a step before).
        stopping: Asked after every step whether to save and stop.
    """

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int, Mapping[str, Any]], None] = lambda step, steps, metrics: None
    stopping: Callable[[], bool] = lambda: False


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
        self.config, self.source = _sizes(settings)
        self.method = _method(settings)
        tables.get_layout(settings.export_layout)  # not only when all is done
        check_name(settings.voice_name)
        per_host = settings.per_device_train_batch_size * sharding.batch_multiple()
        if per_host % jax.process_count():
            raise ValueError(
                f"{per_host} rows of a micro-batch do not divide by {jax.process_count()} processes"
            )
        self.rows = per_host // jax.process_count()
        self.data = open_data(settings, settings.train_file, "train", self.config, hooks)
        self.eval_data = None
        if settings.eval_file is not None:
            self.eval_data = open_data(settings, settings.eval_file, "eval", self.config, hooks)
        self.steps = self._count_steps()
        self.step_config = self._step_config()
        self.log: Log | None = None
        self.skipped = 0

    def go(self) -> Path:
        """Returns the directory of the exported weights."""
        settings, note = self.settings, self.hooks.note
        open_run(settings.output_dir, self._description())
        checkpoints = Checkpoints(settings.output_dir, keep=settings.save_total_limit)
        try:
            state, frozen = self._load()
            batches = self.data.batches(
                seed=settings.seed,
                epochs=self._epochs(),
                rows=self.rows,
                accumulation=settings.gradient_accumulation_steps,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            state, made = self._resume(checkpoints, state, batches)
            if jax.process_index() == 0:
                self.log = Log(settings.output_dir, step=made, tensorboard=settings.tensorboard)
            with contextlib.closing(batches):
                state = self._loop(state, frozen, batches, checkpoints, made)
            note("writing the trained weights")
            if jax.process_count() > 1:
                state, frozen = _whole(state), _whole(frozen)
            return export(
                settings,
                self.config,
                self.method,
                state.trainable,
                frozen,
                data=self.data,
                note=note,
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

    def _step_config(self) -> StepConfig:
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
            ),
            optimizer=OptimizerConfig(
                learning_rate=rate,
                lr_scheduler_type=s.lr_scheduler_type,
                warmup_steps=math.ceil(s.warmup_ratio * self.steps) if self.steps > 1 else 0,
                max_steps=self.steps,
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
        mesh = sharding.current_mesh()
        return self.settings.deciding() | {
            "model": dataclasses.asdict(self.config),
            "steps": self.steps,
            "computed_in": self.dtype,
            "rows": self.rows * jax.process_count(),
            "mesh": None if mesh is None else dict(mesh.shape),
            "train_data": self.data.fingerprint,
        }

    def _load(self) -> tuple[TrainState, Params]:
        settings, config, note = self.settings, self.config, self.hooks.note
        mesh, dtype = sharding.current_mesh(), self.dtype
        stored = "float32" if isinstance(self.method, Full) else dtype
        key = jax.random.key(settings.seed)
        if self.source is None:
            params = init_params(config, key, dtype=stored)
        else:
            from csm_jax import weights

            note(f"loading {settings.model_name_or_path}")
            _, params = weights.load_checkpoint(
                self.source, layout=settings.layout, dtype=stored, config=config
            )
        trainable, frozen = divide(self.method, params, config=config, key=key, dtype=dtype)
        if mesh is not None:
            trainable = _put(trainable, trainable_shardings(self.method, mesh, config=config))
            frozen = _put(frozen, param_shardings(config, mesh)) if frozen else {}
        count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
        note(
            f"training {count:,} of {num_params(config) + (count if frozen else 0):,} parameters "
            f"({settings.method}) for {self.steps:,} steps"
        )
        return init_state(trainable, self.step_config.optimizer), frozen

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
        evaluate = make_evaluation(self.step_config) if self.eval_data is not None else None
        sampler = self._sampler()
        meter = Meter(self.config, settings)
        pending: tuple[Metrics, Work] | None = None
        saved = made if made in checkpoints.steps() else -1
        while made < self.steps:
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
                checkpoints.save(state, batches.state())
                saved = made
            evaluating = evaluate is not None and _due(made, settings.eval_steps, self.steps)
            sampling = sampler is not None and _due(made, settings.sample_steps, self.steps)
            if evaluating or sampling:
                jax.block_until_ready(metrics)
                meter.pause()
                if evaluate is not None and evaluating:
                    self._evaluate(evaluate, state, frozen, made)
                if sampler is not None and sampling:
                    sampler.speak(made, state.trainable, frozen)
                meter.go_on()
            if stopping and made < self.steps:
                self._tell(made, *pending, meter)
                checkpoints.wait()
                raise Stopped(saved)
        if pending is not None:
            self._tell(made, *pending, meter)
        checkpoints.wait()
        return state

    def _tell(self, step: int, metrics: Metrics, work: Work, meter: Meter) -> None:
        meter.add(work)
        values = {
            name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()
        }
        self.skipped = self.skipped + 1 if values["skipped"] else 0
        if self.skipped >= _MOST_SKIPPED:
            raise DivergedError(
                f"the gradient was not finite for {self.skipped} steps up to {step:,}: lower "
                f"--learning_rate, or go on from an earlier checkpoint of {self.settings.output_dir}"
            )
        self.hooks.progress(step, self.steps, values)
        if self.log is not None and (step % self.settings.logging_steps == 0 or step == self.steps):
            self.log.write("train", step, values | meter.read())

    def _evaluate(
        self, evaluate: Callable[..., Any], state: TrainState, frozen: Params, made: int
    ) -> None:
        if self.eval_data is None:
            return
        sums, counts = None, None
        for batch in self.eval_data.eval_batches(
            rows=self.rows, process_index=jax.process_index(), process_count=jax.process_count()
        ):
            found = jax.device_get(
                evaluate(state.trainable, frozen, place(batch, accumulated=False))
            )
            found = jax.tree.map(np.float64, found)
            if sums is None:
                sums, counts = found
            else:
                sums, counts = jax.tree.map(np.add, (sums, counts), found)
        if sums is None or counts is None:
            return
        values = summary(sums, counts, self.step_config.loss)
        values = {name: np.asarray(value).tolist() for name, value in values.items()}
        self.hooks.note(
            f"step {made:,}: eval loss {values['loss']:.4f} (c0 {values['c0']:.4f}, decoder "
            f"{values['decoder']:.4f}, eos_c0 {values['eos_c0']:.4f})"
        )
        if self.log is not None:
            self.log.write("eval", made, values)

    def _sampler(self) -> Sampler | None:
        if self.settings.sample_steps is None:
            return None
        from csm_jax.train.samples import Sampler

        return Sampler(self.settings, self.config, self.method, self.dtype)


def _sizes(settings: RunSettings) -> tuple[CSMConfig, Path | None]:
    """Returns the model's sizes and its checkpoint, None where the weights start random."""
    if settings.scratch is not None:
        presets = {"csm_1b": csm_config.csm_1b, "tiny": csm_config.tiny}
        if settings.scratch in presets:
            return presets[settings.scratch](), None
        return csm_config.read_config(settings.scratch), None
    from csm_jax import hub

    files = hub.locate(settings.model_name_or_path)
    # A lone checkpoint has no config.json.
    if files.config is None:
        return csm_config.csm_1b(), files.checkpoint
    return csm_config.read_config(files.config), files.checkpoint


def _method(settings: RunSettings) -> Method:
    if settings.method == "lora":
        return Lora(LoraConfig(rank=settings.lora_rank, alpha=settings.lora_alpha))
    return Prefix(settings.prefix_positions) if settings.method == "prefix" else Full()


def open_data(
    settings: RunSettings, path: Path, name: str, config: CSMConfig, hooks: Hooks
) -> TrainData:
    """Returns tokenised data; what is not tokenised yet is, into the run's directory.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: The data are bad, or were made for another model.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or directory")
    if not path.is_dir():
        from csm_jax.data.tokenize import tokenize_for

        made = settings.output_dir / "data" / name
        hooks.note(f"tokenising {path} into {made}")

        def stop(*_: Any) -> None:
            if hooks.stopping():
                raise Stopped(0)

        tokenize_for(
            path,
            made,
            model=settings.model_name_or_path,
            max_length=settings.max_length,
            on_item=stop,
            on_progress=stop,
        )
        path = made
    data = TrainData(
        path,
        config=config,
        max_length=settings.max_length,
        prefix_positions=settings.prefix_length,
    )
    check_origin(data, settings.model_name_or_path, hooks.note)
    return data


def check_origin(data: TrainData, model: str, note: Callable[[str], None]) -> None:
    """Checks that data hold the ids and codes of a model's own tokenizer and codec.

    Raises:
        ValueError: Of others. What the model's files do not hold is noted and not compared.
    """
    from csm_jax import hub
    from csm_jax.data.identity import codec_hash, tokenizer_hash

    for what, known, find in (
        ("tokenizer", data.tokenizer_hash, lambda: tokenizer_hash(hub.locate(model).tokenizer())),
        ("codec", data.codec_hash, lambda: codec_hash(model)),
    ):
        try:
            own = find()
        except (FileNotFoundError, hub.HubError) as error:
            note(
                f"the data's {what} is not compared with the model's: {str(error).splitlines()[0]}"
            )
            continue
        if own != known:
            raise ValueError(
                f"{data.directory} was tokenised with another {what} ({known[:12]}) than that of {model} "
                f"({own[:12]}): tokenise the recordings again with --model {model}"
            )


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
