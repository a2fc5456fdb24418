"""The codec's training run: what it leaves, what stops it, and how it goes on."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from csm_jax.audio import encode_audio
from csm_jax.config import SAMPLE_RATE
from csm_jax.mimi.codec import JaxMimi
from csm_jax.weights.mimi import load_mimi
from recipes.demo_voice import codec, codec_run
from recipes.demo_voice.codec_plan import Crops, Plan, demo_plan, load_clips
from recipes.demo_voice.codec_run import Budget, Hooks, RunError, Stopped, train
from tests.support import mimi_training

STEPS = 6


def plan(**changes) -> Plan:
    """Returns a run of moments: thin, and quantised from its third step on."""
    given = {
        "training": mimi_training.config(),
        "rows": mimi_training.ROWS,
        "frames": mimi_training.FRAMES,
        "unquantised_steps": 2,
        "start_frames": 80,
        "warmup_steps": 2,
        "checkpoint_s": 0.0,
    }
    return dataclasses.replace(demo_plan(), **(given | changes))


def write_speech(directory: Path, split: str, clips: int, *, tar: int = 0) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((len(split), tar))
    with tarfile.open(directory / f"{split}-{tar:04d}.tar", "w") as file:
        for number in range(clips):
            audio = rng.normal(0, 0.1, rng.integers(6_000, 20_000)).astype(np.float32)
            told = {"id": f"{number}", "text": "hello", "speaker": number % 2}
            for ending, data in (
                ("wav", encode_audio(audio, SAMPLE_RATE, "WAV")),
                ("json", json.dumps(told).encode()),
            ):
                member = tarfile.TarInfo(f"{split}-{tar}-{number}.{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech")
    write_speech(path, "train", 8)
    write_speech(path, "dev", 3)
    return path


class Watch:
    """Hooks that keep what they are told, and can stop a run or break it off."""

    def __init__(self, *, stop_at: int | None = None, die_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self.metrics: list[dict] = []
        self._stop_at, self._die_at = stop_at, die_at

    def hooks(self) -> Hooks:
        return Hooks(note=self.notes.append, progress=self._step, stopping=self._stopping)

    def _step(self, made: int, metrics: dict) -> None:
        self.steps.append(made)
        self.metrics.append(metrics)
        if made == self._die_at:
            raise SystemExit  # as abrupt as a kill: nothing of the run catches it

    def _stopping(self) -> bool:
        return self._stop_at is not None and self.steps[-1] >= self._stop_at


def run(speech: Path, out: Path, watch: Watch, *, steps: int = STEPS, **changes) -> Path:
    return train(
        speech,
        out,
        plan=plan(**changes),
        budget=Budget(minutes=None, steps=steps),
        hooks=watch.hooks(),
    )


@pytest.fixture(scope="module")
def whole(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch]:
    """Returns the directory of a run that nothing stopped, and what it told."""
    out, watch = tmp_path_factory.mktemp("whole"), Watch()
    assert run(speech, out, watch) == out / "codec.safetensors"
    return out, watch


def same(one: Path, other: Path) -> bool:
    return all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in ("codec.safetensors", "run.json")
    ) and _leaves(one) == _leaves(other)


def _leaves(out: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    tensors = load_file(out / "state.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_leaves_a_codec_its_record_and_a_picture(whole):
    out, watch = whole
    assert watch.steps == [1, 2, 3, 4, 5, 6]
    sizes, params = load_mimi(out / "codec.safetensors")
    assert sizes == plan().training.mimi
    codes = JaxMimi(sizes, params).encode(np.zeros(4000, np.float32))
    assert codes.shape == (9, 4)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "eval"] == watch.steps
    assert [line["step"] for line in lines if line["kind"] == "train"] == watch.steps
    assert {"convergence", "log", "mel", "semantic", "commitment", "perplexity", "seconds"} <= set(
        lines[0]
    )
    # No codebooks for two steps, and then all of them.
    assert [line["commitment"] > 0 for line in lines if line["kind"] == "train"] == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob(".*"))


def test_the_learning_rate_rises_and_falls_by_shares_of_the_run(whole):
    _, watch = whole
    rates = [metrics["rate"] for metrics in watch.metrics]
    np.testing.assert_allclose(rates, [1 / 3, 2 / 3, 1, 1, 1, 2 / 3])


def test_a_run_that_was_killed_ends_with_the_same_bytes(speech, whole, tmp_path):
    # Two checkpoints are lost: the one at step 2 is the last there is.
    with pytest.raises(SystemExit):
        run(speech, tmp_path, Watch(die_at=3), checkpoint_s=0.0)
    watch = Watch(die_at=5)
    with pytest.raises(SystemExit):
        run(speech, tmp_path, watch, checkpoint_s=1e9)
    assert watch.steps == [3, 4, 5]
    watch = Watch()
    run(speech, tmp_path, watch)
    assert watch.steps == [3, 4, 5, 6]
    assert same(tmp_path, whole[0])


def test_a_run_that_was_stopped_is_saved_and_goes_on(speech, whole, tmp_path):
    with pytest.raises(Stopped, match="saved at step 4"):
        run(speech, tmp_path, Watch(stop_at=4), checkpoint_s=1e9)
    # More speech has come in the meantime; the run keeps to its own.
    watch = Watch()
    more = tmp_path / "speech"
    write_speech(more, "train", 8)
    write_speech(more, "train", 5, tar=1)
    write_speech(more, "dev", 3)
    run(more, tmp_path, watch)
    assert watch.steps == [5, 6]
    assert "going on from step 4" in watch.notes[-1]
    assert same(tmp_path, whole[0])


def test_another_run_is_not_gone_on_with(speech, tmp_path):
    with pytest.raises(SystemExit):
        run(speech, tmp_path, Watch(die_at=2))
    with pytest.raises(RunError, match=r"(?s)another run.*seed: 0 there, 1 now.*choose another"):
        run(speech, tmp_path, Watch(), seed=1)


def test_other_hours_take_the_speech_made_since(speech, tmp_path):
    out, more = tmp_path / "out", tmp_path / "speech"
    write_speech(more, "train", 8)
    write_speech(more, "dev", 3)
    with pytest.raises(Stopped):
        run(more, out, Watch(stop_at=1))
    write_speech(more, "train", 5, tar=1)
    watch = Watch()
    run(more, out, watch, steps=3, hours=7.0)
    assert watch.steps == [2, 3]
    assert "in 13 recordings" in watch.notes[0]


def test_a_finished_run_is_left_as_it_is(speech, whole):
    watch = Watch()
    assert run(speech, whole[0], watch) == whole[0] / "codec.safetensors"
    assert watch.steps == []


def test_minutes_are_counted_over_all_runs(speech, tmp_path):
    budget = Budget(minutes=1e-3, steps=None)
    watch, made = Watch(), plan(unquantised_steps=0)
    train(speech, tmp_path, plan=made, budget=budget, hooks=watch.hooks())
    assert watch.steps
    again = Watch()
    train(speech, tmp_path, plan=made, budget=budget, hooks=again.hooks())
    assert again.steps == []


# --- speech ---------------------------------------------------------------------------------------


def test_crops_are_pieces_of_recordings_and_the_same_for_the_same_number():
    clips = [np.arange(start, start + size, dtype=np.int16) for start, size in ((1, 50), (200, 9))]
    crops = Crops(clips, samples=20, seed=0)
    batch = crops.batch(7, 64)
    np.testing.assert_array_equal(batch, Crops(clips, samples=20, seed=0).batch(7, 64))
    assert (batch != crops.batch(8, 64)).any()
    assert (batch != Crops(clips, samples=20, seed=1).batch(7, 64)).any()
    firsts = set()
    for crop in batch:
        if crop[0] < 200:
            np.testing.assert_array_equal(crop, np.arange(crop[0], crop[0] + 20))
            firsts.add(int(crop[0]))
        else:  # too short: silence follows
            np.testing.assert_array_equal(crop, [*range(200, 209), *[0] * 11])
    assert len(firsts) > 10
    assert 1 in firsts
    assert max(firsts) == 31  # the last that is whole


def test_crops_begin_anywhere_alike():
    clip = np.arange(1, 51, dtype=np.int16)
    crops = Crops([clip], samples=20, seed=0)
    starts = np.concatenate([crops.batch(number, 100)[:, 0] for number in range(60)])
    counts = np.bincount(starts, minlength=32)[1:]
    assert len(counts) == 31
    # An eighth begins at the beginning; of the others each start has 170 +- 13.
    assert 800 < counts[0] < 1_050
    assert counts[1:].min() > 110
    assert counts[1:].max() < 230


def test_no_more_speech_is_held_than_asked_for(speech):
    every = load_clips(speech, "train", most=None, hours=1)
    assert len(every) == 8
    assert len(load_clips(speech, "train", most=5, hours=1)) == 5
    two = len(every[0]) + len(every[1])
    assert len(load_clips(speech, "train", most=None, hours=two / SAMPLE_RATE / 3600)) == 2


# --- the command ----------------------------------------------------------------------------------


def test_the_demo_voice_has_a_codec_of_few_values():
    sizes = demo_plan().training.mimi
    assert (sizes.num_codebooks, sizes.codebook_size, sizes.samples_per_frame) == (8, 512, 1920)


@pytest.mark.parametrize("words", [["--steps", "0"], ["--minutes", "-1"]])
def test_a_budget_that_is_none(tmp_path, capsys, words):
    with pytest.raises(SystemExit):
        codec.main(["--speech", str(tmp_path), "--out", str(tmp_path / "out"), *words])
    assert f"{words[0]} must be more than 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_budget_that_ends_before_there_are_codebooks(speech, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(codec, "demo_plan", plan)
    arguments = ["--speech", str(speech), "--out", str(tmp_path), "--steps", "2"]
    assert codec.main(arguments) == 2
    assert "before the codebooks start (after step 2)" in capsys.readouterr().err
    assert not (tmp_path / codec_run.CODEC_NAME).exists()
    assert (tmp_path / codec_run.STATE_NAME).exists()


def test_missing_speech_is_said_in_a_line(tmp_path, capsys):
    arguments = ["--speech", str(tmp_path / "none"), "--out", str(tmp_path), "--steps", "1"]
    assert codec.main(arguments) == 2
    message = capsys.readouterr().err
    assert "recipes.demo_voice.speech" in message
    assert message.count("\n") == 1


def test_ctrl_c_saves_and_says_so(speech, tmp_path, capsys, monkeypatch):
    import signal

    monkeypatch.setattr(codec, "demo_plan", lambda: plan(checkpoint_s=1e9))
    show = codec._Progress.show

    def press(self, step: int, metrics: dict) -> None:
        show(self, step, metrics)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(codec._Progress, "show", press)
    before = signal.getsignal(signal.SIGINT)
    arguments = ["--speech", str(speech), "--out", str(tmp_path), "--steps", "9"]
    assert codec.main(arguments) == 130
    assert "stopped and saved at step 2" in capsys.readouterr().err
    assert (tmp_path / codec_run.STATE_NAME).exists()
    assert signal.getsignal(signal.SIGINT) is before
