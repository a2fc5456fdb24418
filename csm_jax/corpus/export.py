"""Writes a corpus in the forms that training code reads.

Every form is made beside its place and gets its name when it is complete.

    webdataset   NAME-000000.tar ...: KEY.flac, KEY.codes.npy, KEY.json per row
    parquet      data/train-00000-of-00042.parquet ... with the hub's Audio feature
    nemo         manifest.json and audio/shard-00000/KEY.flac ...
    lhotse       Shar: cuts.000000.jsonl.gz, recording.000000.tar, codes.000000.tar ...
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csm_jax.config import SAMPLE_RATE
from csm_jax.corpus.manifest import key_of
from csm_jax.corpus.plan import Plan, ShardPlan
from csm_jax.corpus.shard import AUDIO, CODES, TAR, TAR_END, TEXT, is_whole, read_commit, tar_entry
from csm_jax.corpus.verify import read_tar


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A committed shard with something in it.

    Attributes:
        path: Its tar.
        commit: What its commit says.
    """

    path: Path
    commit: Mapping[str, Any]

    def rows(self) -> Iterator[tuple[str, dict[str, Any], bytes, np.ndarray]]:
        """Yields (key, what is told of the row, FLAC bytes, codes [n, C]).

        Raises:
            ValueError: A member is damaged.
        """
        members = read_tar(self.path)
        for row in self.commit["rows"]:
            key, found = key_of(row["id"]), {}
            for ending, sha256 in row["sha256"].items():
                name, data = next(members, ("nothing", b""))
                if name != key + ending or hashlib.sha256(data).hexdigest() != sha256:
                    raise ValueError(
                        f"{self.path}: {key}{ending} is damaged; csm-jax batch verify tells more"
                    )
                found[ending] = data
            codes = np.load(io.BytesIO(found[CODES]), allow_pickle=False)
            yield key, json.loads(found[TEXT]), found[AUDIO], codes


Writer = Callable[[Shard, int, int, Path], None]
"""Writes one shard: the shard, its number, how many there are, the directory."""


def export(
    plan: Plan,
    form: str,
    destination: Path,
    *,
    partial: bool = False,
    on_shard: Callable[[], None] = lambda: None,
) -> int:
    """Returns how many rows were written.

    Args:
        plan: The corpus.
        form: One of `FORMS`.
        destination: A directory that is not there yet.
        partial: Write what is committed of a corpus that is not finished.
        on_shard: Called after every shard; may raise to stop: then nothing is left.

    Raises:
        FileExistsError: The destination is there.
        ValueError: The corpus is not finished, or damaged.
        ImportError: A library is missing; the message has the command.
    """
    if destination.exists():
        raise FileExistsError(f"{destination} is there already: choose another place, or remove it")
    if not destination.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {destination.parent}")
    write = FORMS[form]()
    shards = _committed(plan, partial)
    directory = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.part")
    directory.mkdir()
    try:
        for number, shard in enumerate(shards):
            write(shard, number, len(shards), directory)
            on_shard()
        os.rename(directory, destination)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return sum(shard.commit["count"] for shard in shards)


def _committed(plan: Plan, partial: bool) -> list[Shard]:
    found, missing = [], []
    for shard in plan.shards:
        commit = read_commit(plan.shard_dir / shard.name, plan.fingerprint)
        if commit is None or not is_whole(plan.shard_dir / shard.name, commit):
            missing.append(shard.name)
        elif commit["count"]:
            found.append(Shard(path=_tar_of(plan, shard), commit=commit))
    if missing and not partial:
        raise ValueError(
            f"{len(missing)} of {len(plan.shards)} shards are not there yet, such as {missing[0]}: "
            "csm-jax batch run makes them, --partial leaves them out"
        )
    if not found:
        raise ValueError(f"{plan.directory} holds no spoken rows yet")
    return found


def _tar_of(plan: Plan, shard: ShardPlan) -> Path:
    return plan.shard_dir / (shard.name + TAR)


# --- the forms ---------------------------------------------------------------------------------


def _webdataset() -> Writer:
    def write(shard: Shard, number: int, count: int, directory: Path) -> None:
        target = directory / f"train-{number:06d}.tar"
        shutil.copyfile(shard.path, target)
        with target.open("rb") as file:
            copied = hashlib.file_digest(file, "sha256").hexdigest()
        if copied != shard.commit["files"][shard.path.name]["sha256"]:
            raise ValueError(f"{shard.path} is damaged; csm-jax batch verify tells more")

    return write


def _nemo() -> Writer:
    def write(shard: Shard, number: int, count: int, directory: Path) -> None:
        folder = Path("audio") / f"shard-{number:05d}"
        (directory / folder).mkdir(parents=True)
        with (directory / "manifest.json").open("a", encoding="utf-8") as manifest:
            for key, told, flac, _ in shard.rows():
                (directory / folder / (key + AUDIO)).write_bytes(flac)
                entry = {
                    "audio_filepath": (folder / (key + AUDIO)).as_posix(),
                    "text": told["text"],
                    "duration": told["seconds"],
                    "speaker": told["speaker"],
                    "sample_rate": SAMPLE_RATE,
                    "id": told["id"],
                    "seed": told["seed"],
                    "finish_reason": told["finish_reason"],
                    "flags": told["flags"],
                    "model": told["model"],
                    "watermark": told["watermark"],
                }
                for name in ("voice", "context", "extra"):
                    if name in told:
                        entry[name] = told[name]
                manifest.write(json.dumps(entry, ensure_ascii=False) + "\n")

    return write


def _lhotse() -> Writer:
    # Lhotse's own writer needs torch. The form: per number one file of cuts, and per field one tar in
    # which each row's data is followed by its manifest, with placeholders for where the data is.
    def write(shard: Shard, number: int, count: int, directory: Path) -> None:
        cuts, recordings, codes_tar = [], [], []
        for key, told, flac, codes in shard.rows():
            recording = {
                "id": key,
                "sources": [{"type": "shar", "channels": [0], "source": ""}],
                "sampling_rate": SAMPLE_RATE,
                "num_samples": told["samples"],
                "duration": told["seconds"],
                "channel_ids": [0],
            }
            array = {
                "storage_type": "shar",
                "storage_path": "",
                "storage_key": "",
                "shape": list(codes.shape),
            }
            supervision = {
                "id": key,
                "recording_id": key,
                "start": 0.0,
                "duration": told["seconds"],
                "channel": 0,
                "text": told["text"],
                "speaker": str(told.get("voice", told["speaker"])),
            }
            kept = {name: value for name, value in told.items() if name not in ("text", "samples")}
            cuts.append(
                {
                    "id": key,
                    "start": 0.0,
                    "duration": told["seconds"],
                    "channel": 0,
                    "supervisions": [supervision],
                    "custom": {"synthesis": kept},
                    "type": "MonoCut",
                }
            )
            recordings += [(key + AUDIO, flac), (key + ".json", _line(recording))]
            codes_tar += [(key + ".npy", _npy(codes)), (key + ".json", _line(array))]
        lines = b"".join(map(_line, cuts))
        (directory / f"cuts.{number:06d}.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
        for field, members in (("recording", recordings), ("codes", codes_tar)):
            with (directory / f"{field}.{number:06d}.tar").open("wb") as file:
                file.writelines(tar_entry(name, data) for name, data in members)
                file.write(TAR_END)

    return write


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _npy(codes: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    np.save(encoded, codes, allow_pickle=False)
    return encoded.getvalue()


def _parquet() -> Writer:
    from csm_jax.corpus.parquet import write

    return write


FORMS: Mapping[str, Callable[[], Writer]] = {
    "webdataset": _webdataset,
    "parquet": _parquet,
    "nemo": _nemo,
    "lhotse": _lhotse,
}
"""Name to what opens the form's writer."""
