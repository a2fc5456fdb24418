"""Runs: what they leave, what stops them and how they go on, and what they refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from csm_jax import weights
from csm_jax.config import CSMConfig
from csm_jax.data.batch import Batch
from csm_jax.data.loader import TrainData
from csm_jax.model import init_params
from csm_jax.train.checkpoints import RunError
from csm_jax.train.cli import _Bar
from csm_jax.train.hooks import DivergedError, Hooks, Stopped
from csm_jax.train.methods import Full, divide
from csm_jax.train.run import train
from csm_jax.train.settings import RunSettings
from tests.support import data as clips
from tests.support.model import short_config
from tests.support.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def micro() -> CSMConfig:
    config = short_config()
    return dataclasses.replace(
        config,
        backbone=dataclasses.replace(config.backbone, num_layers=1),
        decoder=dataclasses.replace(config.decoder, num_layers=1),
    )


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what is compiled: most runs here are of the same step."""
    with contextlib.ExitStack() as stack:
        for name, value in (
            ("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled"))),
            ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ):
            stack.callback(jax.config.update, name, getattr(jax.config, name))
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory with `model`, without tokenizer and codec, and `data`."""
    path = tmp_path_factory.mktemp("train")
    params = init_params(micro(), jax.random.key(0), dtype=jnp.float32)
    weights.save_checkpoint(path / "model", micro(), params, layout="transformers")
    clips.tokenize(
        clips.some_lines(path / "set", 12), path / "data", config=micro(), max_length=128
    )
    return path


def settings(place: Path, out: Path, **changes) -> RunSettings:
    given = {
        "train_file": place / "data",
        "output_dir": out,
        "model_name_or_path": str(place / "model"),
        "max_length": 128,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "amortization_ratio": 8,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "logging_steps": 1,
        "export_layout": "transformers",
    }
    return RunSettings(**given | changes)


def final(out: Path) -> bytes:
    return (out / "final" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """Returns the directory of a run that nothing stopped."""
    out = place / "whole"
    train(settings(place, out))
    return out


def log(out: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


# --- what it leaves -----------------------------------------------------------------------------


def test_a_run_leaves_weights_that_have_learnt(whole: Path, place: Path):
    lines = log(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    assert len(lines[0]["decoder_codes"]) == micro().num_codebooks - 1
    assert all(line["frames_per_s"] > 0 for line in lines[1:])
    config, params = weights.load_checkpoint(whole / "final")
    assert config == micro()
    _, before = weights.load_checkpoint(place / "model")
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, params)
    assert all(jax.tree.leaves(changed))
    assert sorted(int(path.name) for path in (whole / "checkpoints").iterdir()) == [4, 6]


def test_a_finished_run_is_done_at_once(whole: Path, place: Path):
    notes: list[str] = []
    before = final(whole)
    train(settings(place, whole), Hooks(note=notes.append))
    assert any("going on from step 6" in note for note in notes)
    assert final(whole) == before
    assert len(log(whole)) == STEPS


def test_evaluation_is_the_same_every_time(place: Path, tmp_path: Path):
    asked = settings(
        place,
        tmp_path / "run",
        max_steps=1,
        eval_file=place / "data",
        eval_steps=1,
        learning_rate=1e-12,
        tensorboard=True,
    )
    train(asked)
    again = dataclasses.replace(asked, output_dir=tmp_path / "again", seed=7)
    train(again)
    one, other = log(tmp_path / "run", "eval")[0], log(tmp_path / "again", "eval")[0]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert {"eos_c0", "eos_decoder", "decoder_codes"} <= one.keys()
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


# --- what stops it ------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [(1,), (2, 5)])
def test_a_stopped_run_ends_in_the_same_bits(place: Path, whole: Path, tmp_path: Path, stops):
    out, made = tmp_path / "run", 0

    def count(step, steps, metrics):
        nonlocal made
        made = step

    for stop in stops:
        asked = iter(range(100))
        # Asked before the first step of this start, and after every one.
        first = made if not made else stops[stops.index(stop) - 1]
        with pytest.raises(Stopped) as stopped:
            train(
                settings(place, out),
                Hooks(progress=count, stopping=lambda a=asked, f=first, s=stop: f + next(a) == s),
            )
        assert stopped.value.step == stop
        made = stop
    train(settings(place, out))
    assert final(out) == final(whole)
    assert [line["loss"] for line in log(out)] == [line["loss"] for line in log(whole)]


RUN = """
import json, resource, signal, sys
from pathlib import Path
if sys.argv[3] != "0":  # as a full disk: no file may grow beyond this
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from csm_jax.train.run import Hooks, train
from csm_jax.train.settings import RunSettings
given = json.loads(sys.argv[1])
for name in ("train_file", "output_dir"):
    given[name] = Path(given[name])
train(RunSettings(**given), Hooks(note=lambda text: print(text, flush=True),
      progress=lambda step, steps, metrics: print("step", step, flush=True)))
"""


def start(asked: RunSettings, cache: Path, *, most_bytes: int = 0) -> subprocess.Popen:
    given = {
        field.name: getattr(asked, field.name)
        for field in dataclasses.fields(asked)
        if getattr(asked, field.name) != field.default
    }
    return subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(given, default=str), str(cache), str(most_bytes)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_ends_in_the_same_bits(place: Path, whole: Path, tmp_path: Path, kills: int):
    rng, out, killed = random.Random(kills), tmp_path / "run", 0
    asked = settings(place, out, save_steps=1)
    while True:
        with start(asked, place / "cache") as process:
            assert process.stdout is not None
            if killed < kills:
                for line in process.stdout:
                    # At some instant of a step or of its checkpoint.
                    if line.startswith(("training", "step")) and rng.random() < 0.5:
                        time.sleep(rng.random() * 0.3)
                        process.send_signal(signal.SIGKILL)
                        break
            text = process.stdout.read()
            code = process.wait()
        if code == -signal.SIGKILL:
            killed += 1
            continue
        assert code == 0, text
        if killed >= kills:
            break
        shutil.rmtree(out)  # it was faster than its killer: once more
    assert final(out) == final(whole)
    assert [line["loss"] for line in log(out)] == [line["loss"] for line in log(whole)]


@pytest.mark.parametrize(("calls", "evaluated"), [(1, []), (3, [1]), (4, [1])])
def test_a_run_stops_between_batches_of_an_evaluation(
    place: Path, tmp_path: Path, calls: int, evaluated: list[int]
):
    # Asked: before the first step (1), after it (2), before each batch of its evaluation.
    asked = settings(
        place, tmp_path / "run", max_steps=2, eval_file=place / "data", eval_steps=1, save_steps=9
    )
    count = iter(range(1, 100))
    with pytest.raises(Stopped, match="without --resume_from_checkpoint") as stopped:
        train(asked, Hooks(stopping=lambda: next(count) >= calls))
    assert stopped.value.step == len(evaluated)
    assert not log(asked.output_dir, "eval") if calls > 1 else not log(asked.output_dir)
    train(asked)  # what the checkpoint has not got is made first
    assert [line["step"] for line in log(asked.output_dir, "eval")] == [1, 2]
    assert [line["step"] for line in log(asked.output_dir)] == [1, 2]


def test_a_full_disk_leaves_the_checkpoint_before(place: Path, tmp_path: Path):
    out = tmp_path / "run"
    asked = settings(place, out, save_total_limit=None)
    with pytest.raises(Stopped):
        train(asked, Hooks(stopping=iter([False, False, False, True]).__next__))
    saved = {path.name for path in (out / "checkpoints").iterdir()}
    assert saved == {"2", "3"}

    with start(asked, place / "none", most_bytes=100_000) as process:
        text = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "was not written" in text, text
    assert "the last whole one is that of step 3" in text, text
    train(asked)  # room again
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == STEPS


# --- what it does again -------------------------------------------------------------------------


@pytest.fixture
def done(whole: Path, tmp_path: Path) -> Path:
    """Returns the directory of a run that has ended, to spoil."""
    return shutil.copytree(whole, tmp_path / "run")


def test_a_finished_run_is_evaluated_when_that_is_asked_for(place: Path, done: Path):
    for _ in range(2):
        train(settings(place, done, eval_file=place / "data"))
        assert [line["step"] for line in log(done, "eval")] == [STEPS]


def test_a_run_is_continued_by_the_same_run_alone(place: Path, done: Path, tmp_path: Path):
    path = done / "run.json"
    written = json.loads(path.read_text())
    # Without effect, by another path, or from before there was such a setting: the same run.
    other = shutil.copytree(place / "model", tmp_path / "model")
    del written["optim"]
    path.write_text(json.dumps(written))
    train(settings(place, done, model_name_or_path=str(other), num_train_epochs=9, lora_rank=4))
    path.write_text(json.dumps(written | {"optim": "muon"}))
    with pytest.raises(RunError, match="optim: 'muon' there, 'adamw' now"):
        train(settings(place, done))
    path.write_text(json.dumps(written | {"of_later": 1}))
    with pytest.raises(RunError, match="of_later: 1 there, None now"):
        train(settings(place, done))
    path.write_text(json.dumps(written))
    config, params = weights.load_checkpoint(other)
    params["decoder"]["final_norm"] = params["decoder"]["final_norm"] * 1.01
    weights.save_checkpoint(other, config, params, layout="transformers", overwrite=True)
    with pytest.raises(RunError, match=r"  weights: '\w{64}' there, '\w{64}' now"):
        train(settings(place, done, model_name_or_path=str(other)))


def test_the_result_is_replaced_as_a_whole(place: Path, done: Path, tmp_path: Path):
    model = shutil.copytree(place / "model", tmp_path / "model")
    marks = Path("silentcipher/44_1_khz/73999_iteration")
    (model / marks).mkdir(parents=True)
    for name in ("hparams.yaml", "enc_c.ckpt", "dec_c.ckpt", "dec_m_0.ckpt"):
        (model / marks / name).write_text("one")
    asked = settings(place, done, model_name_or_path=str(model))
    train(asked)
    (model / marks / "hparams.yaml").write_text("two")  # corrected later
    (done / "final" / "old.safetensors").write_text("of before")
    train(dataclasses.replace(asked, export_layout="orbax"))
    assert (done / "final" / marks / "hparams.yaml").read_text() == "two"
    _, params = weights.load_checkpoint(done / "final")
    _, trained = weights.load_checkpoint(place / "whole" / "final")
    jax.tree.map(np.testing.assert_array_equal, params, trained)
    # What the base lacks and was put there stays; of a broken copy nothing is seen.
    shutil.rmtree(model / "silentcipher")
    train(asked)
    assert not (done / "final" / "params").exists()
    there = sorted(path.name for path in (done / "final").iterdir())
    assert there == ["config.json", "model.safetensors", "silentcipher"]
    (done / "final" / marks / "none").symlink_to(tmp_path / "none")
    with pytest.raises(OSError, match="none"):
        train(asked)
    assert sorted(path.name for path in (done / "final").iterdir()) == there
    assert not [path.name for path in done.iterdir() if path.name.startswith(".")]


# --- what it refuses ----------------------------------------------------------------------------


def test_another_run_s_directory_is_refused(place: Path, whole: Path):
    with pytest.raises(RunError) as error:
        train(settings(place, whole, learning_rate=1e-4, seed=1))
    assert "learning_rate: 0.001 there, 0.0001 now" in str(error.value)
    assert "seed: 42 there, 1 now" in str(error.value)


def test_a_damaged_checkpoint_is_named_with_the_one_before(
    place: Path, whole: Path, tmp_path: Path
):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in (out / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:7])
    with pytest.raises(RunError, match=r"6 cannot be read .*--resume_from_checkpoint 4"):
        train(settings(place, out))
    train(settings(place, out, resume_from_checkpoint=4))  # as it says
    assert final(out) == final(whole)


def test_data_of_another_tokenizer_are_refused(place: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    build_tokenizer().save(str(model / "tokenizer.json"))
    with pytest.raises(ValueError, match="was tokenised with another tokenizer"):
        train(settings(place, tmp_path / "run", model_name_or_path=str(model)))


def test_weights_of_too_few_bits_are_refused():
    params = init_params(micro(), jax.random.key(0), dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="are bfloat16, but must be float32"):
        divide(Full(), params, config=micro(), key=jax.random.key(0), dtype="bfloat16")


@pytest.fixture(scope="module")
def not_finite(place: Path) -> Path:
    """A model of finite weights whose scores overflow."""
    model = place / "not-finite"
    config, params = weights.load_checkpoint(place / "model")
    params["backbone"]["final_norm"] = params["backbone"]["final_norm"] * np.float32(1e38)
    weights.save_checkpoint(model, config, params, layout="transformers")
    return model


def test_a_run_that_diverges_ends(place: Path, not_finite: Path, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(DivergedError, match="not finite for 10 steps"):
        train(settings(place, out, model_name_or_path=str(not_finite), max_steps=30))
    assert log(out)[-1]["skipped"] == 1


def test_steps_that_are_not_finite_make_no_result(place: Path, not_finite: Path, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(DivergedError, match="not finite in any of the 3 steps"):
        train(settings(place, out, model_name_or_path=str(not_finite), max_steps=3, save_steps=1))
    assert [line["skipped"] for line in log(out)] == [1, 1, 1]
    assert not (out / "final").exists()


def test_no_checkpoint_is_made_while_steps_are_skipped(place: Path, tmp_path: Path):
    out, notes = tmp_path / "run", []
    asked = settings(
        place, out, learning_rate=1e15, lr_scheduler_type="constant", warmup_ratio=0.0, save_steps=1
    )
    train(asked, Hooks(note=notes.append))
    assert [line["skipped"] for line in log(out)] == [0, 1, 1, 1, 1, 1]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["1", "6"]
    assert "in 5 of 6 steps the gradient was not finite, and nothing moved" in notes


def test_a_skipped_step_is_shown(capsys: pytest.CaptureFixture[str]):
    told = dict.fromkeys(("loss", "c0", "decoder", "grad_norm", "learning_rate"), 0.5)
    for step in (7, 8):
        _Bar().update(step, 100, told | {"skipped": step % 2})
    assert capsys.readouterr().err.splitlines() == [
        "step 7 of 100: loss 0.5000 (c0 0.5000, decoder 0.5000), gradient 0.50, rate 5.00e-01; "
        "not finite: skipped"
    ]


def test_two_processes_are_not_at_work_in_one_directory(place: Path, done: Path):
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX, 1, 0); "
        "print('holds it', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(done / "run.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunError, match=f"another process is training in {done}"):
            train(settings(place, done))
        other.communicate()
    train(settings(place, done))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "[]", "run.json is damaged: it holds no JSON object"),
        ("run.json", "null", "run.json is damaged: it holds no JSON object"),
        ("log.jsonl", '{"kind": "train", "step": 1}\nnull\n', "log.jsonl: line 2 is none of"),
        ("log.jsonl", '{"kind": "train", "step": "x"}\n', "log.jsonl: line 1 is none of"),
    ],
)
def test_damaged_files_of_a_run_are_named(place: Path, done: Path, name: str, text: str, message):
    (done / name).write_text(text)
    with pytest.raises(RunError, match=message):
        train(settings(place, done))


def test_settings_are_checked_before_anything_is_tokenised(place: Path, done: Path, tmp_path: Path):
    # The model has no tokenizer, so that tokenising would be an error of its own.
    untold = place / "set" / "talks.jsonl"
    with pytest.raises(ValueError, match="learning_rate must be positive and finite, got inf"):
        train(settings(place, tmp_path / "new", train_file=untold, learning_rate=math.inf))
    assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match="seed: 42 there, 1 now"):
        train(settings(place, done, train_file=untold, seed=1))


def test_the_prefix_is_named_where_it_leaves_too_little(
    place: Path, random_model: Path, tmp_path: Path
):
    asked = settings(
        place,
        tmp_path / "run",
        train_file=place / "set" / "talks.jsonl",
        model_name_or_path=str(random_model),
        method="prefix",
        consent=True,
        prefix_positions=120,
    )
    with pytest.raises(ValueError, match="of max_length=128 positions the prefix takes prefix_pos"):
        train(asked)
    with pytest.raises(ValueError, match=r"8 positions \(max_length=128 less prefix_positions=120"):
        TrainData(place / "data", config=micro(), max_length=128, prefix_positions=120)


def test_missing_data_are_named(place: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: there is no such file"):
        train(settings(place, tmp_path / "run", train_file=tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "prefix"}, "whoever is heard in the recordings agreed"),
        ({"method": "all"}, "method must be one of full, lora, prefix"),
        ({"scratch": "tiny", "method": "lora"}, "scratch trains all weights"),
        ({"save_steps": 0}, "save_steps must be at least 1"),
        ({"eval_steps": 5}, "eval_steps needs an eval_file"),
        ({"sample_steps": 5}, "sample_steps and sample_text go together"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be at least 0 and below 1"),
        ({"dtype": "int8"}, "dtype must be float32 or bfloat16"),
        ({"quantize": "nf4"}, "quantize is for method='lora'"),
        ({"quantize": "nf4", "method": "lora", "mesh": "data=1"}, "without a mesh"),
        ({"optim": "muon", "method": "lora"}, "muon' is for method='full'"),
        ({"decoder_loss_weight": math.inf}, "decoder_loss_weight must be at least 0 and finite"),
        ({"seed": -1}, "seed must be at least 0 and below 2"),
        ({"seed": 2**63}, "seed must be at least 0 and below 2"),
        ({"sample_speaker": -1}, "sample_speaker must be at least 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    place: Path, tmp_path: Path, changes, message
):
    with pytest.raises(ValueError, match=message):
        settings(place, tmp_path, **changes)


def test_batches_are_fed_whole(place: Path):
    # Every trained frame of an epoch is in exactly one batch.
    opened = TrainData(place / "data", config=micro(), max_length=128)
    batches = opened.batches(
        seed=0, epochs=1, rows=2, accumulation=2, process_index=0, process_count=1
    )
    seen: list[Batch] = list(batches)
    assert sum(int(batch.trained.sum()) for batch in seen) == opened.num_trained_frames


# --- other ways of training ---------------------------------------------------------------------


def test_adapters_over_quantised_weights_are_trained_and_merged(place: Path, tmp_path: Path):
    pytest.importorskip("qwix")
    from csm_jax.train.quantize import quantise

    out = tmp_path / "run"
    train(settings(place, out, method="lora", quantize="nf4", learning_rate=5e-3))
    lines = log(out)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    _, before = weights.load_checkpoint(place / "model")
    _, merged = weights.load_checkpoint(out / "final")
    rounded = quantise(before, "nf4")["backbone"]["layers"]["0"]["attn"]["q_proj"]
    q_proj = merged["backbone"]["layers"]["0"]["attn"]["q_proj"]
    # The adapters were trained over the rounded weights, and are merged with those.
    correction = np.asarray(q_proj - rounded.astype(jnp.float32))
    assert np.linalg.matrix_rank(correction, tol=1e-4) <= 16 < min(correction.shape)
    assert np.abs(correction).max() > 0
    np.testing.assert_array_equal(
        merged["backbone"]["text_embeddings"], before["backbone"]["text_embeddings"]
    )


@pytest.mark.slow  # three runs, Muon compiled in each
def test_a_model_from_scratch_is_as_stopped_as_not(place: Path, tmp_path: Path):
    notes: list[str] = []
    asked = settings(
        place,
        tmp_path / "run",
        scratch=str(place / "model" / "config.json"),
        optim="muon",
        history_noise=0.2,
        codebook_dropout=0.5,
    )
    train(asked, Hooks(note=notes.append))
    # What the data were made with comes along, or is said to be lacking.
    assert any("final lacks tokenizer-e351c8d8" in note for note in notes)
    again = dataclasses.replace(asked, output_dir=tmp_path / "again")
    calls = iter(range(100))
    with pytest.raises(Stopped):
        train(again, Hooks(stopping=lambda: next(calls) == 2))
    train(again)
    assert final(tmp_path / "again") == final(tmp_path / "run")
    plain = dataclasses.replace(asked, output_dir=tmp_path / "plain", history_noise=0.0)
    train(plain)
    assert final(tmp_path / "plain") != final(tmp_path / "run")
