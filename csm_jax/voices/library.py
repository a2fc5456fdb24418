"""The voices in a directory, by name."""

from __future__ import annotations

import contextlib
import difflib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from csm_jax.voices.files import SUFFIX, VoiceFileError, read_voice, write_voice
from csm_jax.voices.voice import Voice, check_name, name_complaint

_NEEDED = ("source", "consent", "created")


class UnknownVoiceError(ValueError):
    """A library has no voice of this name; the message has the names nearest to it."""


def default_directory() -> Path:
    """Returns where voices are kept: `$CSM_JAX_VOICES`, or `csm_jax/voices` in the user's data directory."""
    chosen = os.environ.get("CSM_JAX_VOICES")
    if chosen:
        return Path(chosen).expanduser()
    data = os.environ.get("XDG_DATA_HOME", "")
    # Relative ones are to be ignored, says the XDG base directory specification.
    base = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return base / "csm_jax" / "voices"


def find_voice(name_or_file: str, directory: str | os.PathLike[str] | None = None) -> Voice:
    """Returns the voice in a file, which ends in `.safetensors`, or else a library's of that name.

    Args:
        name_or_file: Which.
        directory: The library's; by default `default_directory()`.

    Raises:
        TypeError, ValueError, UnknownVoiceError, VoiceFileError: As `VoiceLibrary.get`.
        OSError: There is no such file, or it cannot be read.
    """
    if name_or_file.endswith(SUFFIX):
        return read_voice(Path(name_or_file))
    return VoiceLibrary(directory).get(name_or_file)


class VoiceLibrary:
    """The voices in one directory, a file each; iterating gives them in the order of their names.

    Several processes may use a directory at once: a file appears, is replaced and goes as a whole.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        """Looks at nothing yet; the directory is made with the first voice.

        Args:
            directory: By default `default_directory()`.
        """
        self.directory = default_directory() if directory is None else Path(directory)

    def names(self) -> list[str]:
        """Returns the names of all voices, sorted; none of the files is read.

        Raises:
            OSError: The directory cannot be listed, or is none.
        """
        return sorted(self._files())

    def get(self, name: str) -> Voice:
        """Returns the voice of this name, which is matched exactly.

        Raises:
            TypeError, ValueError: It cannot be a voice's name.
            UnknownVoiceError: There is none.
            VoiceFileError: Its file is damaged, is no voice, or was written by a newer version.
            OSError: It cannot be read.
        """
        path = self.path(name)
        try:
            voice = read_voice(path)
        except FileNotFoundError:  # removed a moment ago
            raise self._unknown(name) from None
        if voice.name != name:
            raise VoiceFileError(
                f"{path} holds the voice {voice.name!r}: rename it to {voice.name}{SUFFIX}, or "
                "remove it"
            )
        return voice

    def __iter__(self) -> Iterator[Voice]:
        for name in self.names():
            with contextlib.suppress(UnknownVoiceError):  # removed meanwhile
                yield self.get(name)

    def path(self, name: str) -> Path:
        """Returns the file of a voice.

        Raises:
            TypeError, ValueError: As `get`.
            UnknownVoiceError: There is none.
        """
        try:
            return self._files()[check_name(name)]
        except KeyError:
            raise self._unknown(name) from None

    def check_add(self, name: str, *, replace: bool = False) -> None:
        """Checks that a voice of this name can be added; call it before encoding one.

        Raises:
            TypeError, ValueError: It cannot be a voice's name, or differs from another's only in case.
            FileExistsError: There is such a voice, and it is not to be replaced.
            OSError: Files cannot be created in the directory.
        """
        self._check_free(name, replace=replace)
        # By trying: permission bits alone say nothing about read-only mounts or a root user.
        with self._writing():
            temporary = self._temporary(name)
            try:
                temporary.touch(exist_ok=False)
            finally:
                temporary.unlink(missing_ok=True)

    def add(self, voice: Voice, *, replace: bool = False) -> Path:
        """Returns the file that now holds the voice.

        Whatever goes wrong leaves nothing behind, and a voice that was there as it was.

        Args:
            voice: What to keep.
            replace: Whether it may take the place of a voice of the same name.

        Raises:
            ValueError: It does not say where it comes from (`make_provenance`), or its name differs from
                another's only in case.
            FileExistsError: There is such a voice, and it is not to be replaced.
            OSError: It cannot be written.
        """
        lacking = [key for key in _NEEDED if key not in voice.provenance]
        if lacking:
            raise ValueError(
                f"voice {voice.name!r} does not say where it comes from: its provenance lacks "
                f"{', '.join(lacking)} (csm_jax.voices.make_provenance gives them)"
            )
        self._check_free(voice.name, replace=replace)
        target = self.directory / f"{voice.name}{SUFFIX}"
        with self._writing():
            temporary = self._temporary(voice.name)
            try:
                write_voice(temporary, voice)
                if replace:
                    os.replace(temporary, target)
                else:
                    _place_new(temporary, target)
            except FileExistsError:
                raise self._taken(voice.name) from None
            finally:
                temporary.unlink(missing_ok=True)
        return target

    def remove(self, name: str) -> None:
        """Removes a voice, be its file damaged or not.

        Raises:
            TypeError, ValueError: As `get`.
            UnknownVoiceError: There is none.
            OSError: It cannot be removed.
        """
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            raise self._unknown(name) from None

    def _files(self) -> dict[str, Path]:
        # Names are looked up here and nowhere else: none ever becomes part of a path that is opened.
        try:
            with os.scandir(self.directory) as entries:
                files = [Path(entry.path) for entry in entries if entry.is_file()]
        except FileNotFoundError:
            return {}
        return {
            path.stem: path
            for path in files
            if path.suffix == SUFFIX and name_complaint(path.stem) is None
        }

    def _check_free(self, name: str, *, replace: bool) -> None:
        check_name(name)
        names = self.names()
        if name in names:
            if not replace:
                raise self._taken(name)
            return
        # One file on the disks of macOS and Windows, where a library may be copied to.
        same = [other for other in names if other.lower() == name.lower()]
        if same:
            raise ValueError(
                f"{self.directory} has the voice {same[0]!r}, which differs from {name!r} only in "
                "case: use that name, or another"
            )

    def _temporary(self, name: str) -> Path:
        return self.directory / f".{name}.{secrets.token_hex(4)}.part"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes the directory, and lets errors say what could not be written."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            if error.errno is None:  # ours, with a message of its own
                raise
            reason = error.strerror or error
            raise type(error)(
                error.errno, f"cannot write to the voices in {self.directory}: {reason}"
            ) from error

    def _taken(self, name: str) -> FileExistsError:
        return FileExistsError(
            f"{self.directory} already has a voice {name!r}: choose another name, or replace it with "
            "--replace (in Python: replace=True)"
        )

    def _unknown(self, name: str) -> UnknownVoiceError:
        names = self.names()
        lower = {other.lower(): other for other in names}
        near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower)]
        if near:
            hint = f"did you mean {' or '.join(map(repr, near))}?"
        elif names:
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            hint = f"there are {', '.join(names[:8])}{more}"
        else:
            hint = "there is none at all; add one with `csm-jax voices add`"
        return UnknownVoiceError(f"{self.directory} has no voice {name!r}; {hint}")


def _place_new(temporary: Path, target: Path) -> None:
    """Gives a finished file its name, unless another file has it.

    Raises:
        FileExistsError: Another file has it.
    """
    try:
        os.link(temporary, target)  # unlike a rename, it never takes another file's place
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the moment between the two is the best there is
        if target.exists():
            raise FileExistsError(target) from None
        os.replace(temporary, target)
