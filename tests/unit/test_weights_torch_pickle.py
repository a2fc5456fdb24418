"""ckpt.pt: real torch files read equal, and no hostile file runs anything."""

from __future__ import annotations

import builtins
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csm_jax.weights import WeightsError
from csm_jax.weights.pickle_machine import describe
from csm_jax.weights.torch_pickle import MAX_PICKLE_BYTES, TorchSource
from tests.support.checkpoints import BFLOAT16, assert_same_bits


def read(path: Path) -> dict[str, np.ndarray]:
    source = TorchSource(path)
    try:
        return {name: source.read(name) for name in source.specs}
    finally:
        source.close()


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


BASE = torch.arange(60.0).reshape(3, 4, 5)
TENSORS = {
    "plain": BASE.clone(),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 7),
    "brain": torch.randn(4, 3).bfloat16(),
    "half": torch.randn(4, 3).half(),
    "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    "transposed": torch.randn(4, 6).T,
    "permuted": BASE.permute(2, 0, 1),
    "slice": BASE[1:, ::2, 3:],
    "row": BASE[1],
    "expanded": torch.arange(3.0).reshape(3, 1).expand(3, 4),
    "shared": BASE,
}


@pytest.mark.parametrize("nested", [False, True], ids=["bare", "under model"])
def test_real_files(tmp_path, nested):
    torch.save({"model": TENSORS, "epoch": 3, "lr": 1e-3} if nested else TENSORS, tmp_path / "f.pt")
    expected = {name: as_numpy(tensor) for name, tensor in TENSORS.items()}
    assert_same_bits(read(tmp_path / "f.pt"), expected)


def test_chunks_are_the_whole(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "f.pt")
    monkeypatch.setattr("csm_jax.weights.torch_pickle.CHUNK_BYTES", 16)
    source = TorchSource(tmp_path / "f.pt")
    for name, tensor in TENSORS.items():
        whole = as_numpy(tensor).reshape(-1)
        chunks = list(source.chunks(name))
        assert all(chunk.nbytes <= 16 for chunk in chunks), name
        flat = np.concatenate(chunks) if chunks else whole[:0]
        assert flat.tobytes() == whole.tobytes(), name
    source.close()


def test_module_and_optimiser_states(tmp_path):
    """What trainers save: a Module's state dict (with its hidden `_metadata`) and an optimiser's."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimiser = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    state = {"model": module.state_dict(), "optimizer": optimiser.state_dict(), "done": None}
    torch.save(state, tmp_path / "f.pt")
    expected = {name: as_numpy(tensor) for name, tensor in module.state_dict().items()}
    assert_same_bits(read(tmp_path / "f.pt"), expected)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path, protocol):
    torch.save(TENSORS, tmp_path / "f.pt", pickle_protocol=protocol)
    assert_same_bits(
        read(tmp_path / "f.pt"), {name: as_numpy(tensor) for name, tensor in TENSORS.items()}
    )


def test_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": BASE}, tmp_path / "f.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same_bits(read(tmp_path / "f.pt"), {"a": BASE.numpy()})


def test_wrong_dtypes_are_named_by_tensor(tmp_path):
    torch.save({"a": torch.arange(3), "b": torch.ones(2).double()}, tmp_path / "f.pt")
    source = TorchSource(tmp_path / "f.pt")
    assert {name: spec.dtype for name, spec in source.specs.items()} == {
        "a": "int64",
        "b": "float64",
    }
    source.close()


def test_legacy_format_is_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"f\.pt: a bare pickle.*again with torch\.save"):
        TorchSource(tmp_path / "f.pt")


def test_what_is_not_a_tensor_is_listed(tmp_path):
    torch.save({"a": BASE, "b": 3, "c": [BASE]}, tmp_path / "f.pt")
    with pytest.raises(WeightsError, match="2 problems") as caught:
        TorchSource(tmp_path / "f.pt")
    assert "entry 'b' is a int" in str(caught.value)
    torch.save([BASE], tmp_path / "g.pt")
    with pytest.raises(WeightsError, match="holds a list"):
        TorchSource(tmp_path / "g.pt")


# --- damaged zips --------------------------------------------------------------------------------


def records_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


@pytest.fixture
def records(tmp_path) -> dict[str, bytes]:
    torch.save({"a": BASE, "b": torch.ones(3)}, tmp_path / "f.pt")
    return records_of(tmp_path / "f.pt")


def test_big_endian(tmp_path, records):
    for name in ("f/data/0", "f/data/1"):
        records[name] = np.frombuffer(records[name], "<f4").astype(">f4").tobytes()
    records["f/byteorder"] = b"big"
    write_zip(tmp_path / "g.pt", records)
    assert_same_bits(read(tmp_path / "g.pt"), {"a": BASE.numpy(), "b": np.ones(3, np.float32)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"f/byteorder": b"middle"}, "unknown byte order"),
        ({"f/byteorder": b"x" * 99}, "unknown byte order"),
        ({"f/data/1": None}, "tensor b: its data record '1' is missing"),
        ({"f/data/0": b"1234"}, "tensor a: its data record has 4 bytes, expected 240"),
        ({"f/data.pkl": None}, "no single 'data.pkl'"),
        ({"g/data.pkl": b"."}, "no single 'data.pkl'"),
        ({"f/data.pkl": b""}, "exhausted"),
        ({"f/data.pkl": b"\x80\x02."}, "unfinished"),
        ({"f/data.pkl": b"." + b"\0" * MAX_PICKLE_BYTES}, "the limit is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_damaged_records(tmp_path, records, change, words):
    kept = {name: data for name, data in {**records, **change}.items() if data is not None}
    write_zip(tmp_path / "g.pt", kept)
    with pytest.raises(WeightsError, match=words):
        TorchSource(tmp_path / "g.pt")


def test_compressed_records_are_refused(tmp_path, records):
    """A zip bomb needs compression; torch never compresses."""
    records["f/data/0"] = b"\0" * (1 << 20)
    write_zip(tmp_path / "g.pt", records, zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed or encrypted"):
        TorchSource(tmp_path / "g.pt")


@pytest.mark.parametrize(("field", "value"), [(10, 8), (8, 1)], ids=["deflated", "encrypted"])
def test_records_that_only_say_so_are_refused(tmp_path, records, field, value):
    write_zip(tmp_path / "g.pt", records)
    content = bytearray((tmp_path / "g.pt").read_bytes())
    content[content.rfind(b"f/data/1") - 46 + field] = value
    (tmp_path / "g.pt").write_bytes(content)
    with pytest.raises(WeightsError, match="'f/data/1' is compressed or encrypted"):
        TorchSource(tmp_path / "g.pt")


def test_overlapping_records_are_refused(tmp_path, records):
    write_zip(tmp_path / "g.pt", records)
    content = bytearray((tmp_path / "g.pt").read_bytes())
    # Point the directory entry of the second storage at the header of the first.
    first, second = content.find(b"f/data/0") - 30, content.rfind(b"f/data/1") - 46
    content[second + 42 : second + 46] = struct.pack("<I", first)
    (tmp_path / "g.pt").write_bytes(content)
    with pytest.raises(WeightsError, match="overlaps"):
        TorchSource(tmp_path / "g.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_record_twice_is_refused(tmp_path, records):
    with zipfile.ZipFile(tmp_path / "g.pt", "w") as archive:
        for name, data in (*records.items(), ("f/data/0", b"\0" * 240)):
            archive.writestr(name, data)
    with pytest.raises(WeightsError, match="'f/data/0' occurs twice"):
        TorchSource(tmp_path / "g.pt")


def test_truncation_anywhere_is_found(tmp_path, records):
    write_zip(tmp_path / "g.pt", records)
    good = (tmp_path / "g.pt").read_bytes()
    for size in range(0, len(good), 7):
        (tmp_path / "bad.pt").write_bytes(good[:size])
        with pytest.raises(WeightsError, match=r"bad\.pt: (truncated|not a torch)"):
            TorchSource(tmp_path / "bad.pt")


@pytest.mark.parametrize("view", [False, True], ids=["whole storage", "part of a storage"])
def test_damaged_data_is_found(tmp_path, view):
    torch.save({"a": BASE[1] if view else BASE}, tmp_path / "f.pt")
    content = bytearray((tmp_path / "f.pt").read_bytes())
    content[content.find(BASE.numpy().tobytes()) + 100] ^= 1
    (tmp_path / "f.pt").write_bytes(content)
    with pytest.raises(WeightsError, match="'f/data/0' is damaged: its checksum"):
        read(tmp_path / "f.pt")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "f.pt").write_bytes(b"GGUF" + b"\0" * 50)
    with pytest.raises(WeightsError, match="no zip file"):
        TorchSource(tmp_path / "f.pt")
    with pytest.raises(FileNotFoundError):
        TorchSource(tmp_path / "none.pt")


# --- hostile pickles -----------------------------------------------------------------------------

RAN: list[str] = []


def sentinel(*args: object) -> dict[str, object]:
    """What every hostile pickle below tries to have called."""
    RAN.append("ran")
    return {}


class Call:
    """Pickles into a call of `function`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


class Stateful:
    def __setstate__(self, state):
        sentinel()

    def __getstate__(self):
        return {"x": 1}


class Constructed:
    def __new__(cls, *args, **kwargs):
        sentinel()
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (1,), {"x": 2}


class Loud(dict):
    def __setitem__(self, key, value):
        sentinel()

    def __reduce__(self):
        return Loud, (), None, None, iter([("a", 1)])


def made(value: object, protocol: int) -> bytes:
    data = pickle.dumps(value, protocol)
    RAN.clear()  # making some of them runs the sentinel
    return data


HERE = __name__.encode()
NAME = HERE + b"\nsentinel\n"
TOUCH = b"X\x04\x00\x00\x00true"
ORDERED = b"ccollections\nOrderedDict\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
FLOAT = b"ctorch\nFloatStorage\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def storage(size: bytes = b"K\x04", key: str = "0") -> bytes:
    return b"(" + text("storage") + FLOAT + text(key) + text("cpu") + size + b"tQ"


def tensor(
    shape: bytes = b"(K\x04t", strides: bytes = b"(K\x01t", offset: bytes = b"K\x00"
) -> bytes:
    return REBUILD + b"(" + storage() + offset + shape + strides + b"\x89" + ORDERED + b")RtR"


CALLS = {
    "sentinel": Call(sentinel, "x"),
    "os.system": Call(__import__("os").system, "true"),
    "posix.system": Call(__import__("posix").system, "true"),
    "subprocess": Call(__import__("subprocess").Popen, ["true"]),
    "eval": Call(eval, "1+1"),
    "exec": Call(exec, "1"),
    "import": Call(__import__, "os"),
    "getattr": Call(getattr, Call(__import__, "os"), "system"),
    "getattr chain": Call(getattr, Call(getattr, Call(__import__, "os"), "path"), "join"),
    "open": Call(open, "/etc/hostname"),
    "runpy": Call(__import__("runpy").run_path, "x.py"),
    "importlib": Call(__import__("importlib").import_module, "os"),
    "pickle.loads": Call(pickle.loads, b"."),
    "torch.load": Call(torch.load, "x"),
    "torch.hub": Call(torch.hub.load, "x"),
    "numpy": Call(np.load, "x"),
    "operator": Call(__import__("operator").attrgetter, "system"),
    "functools": Call(__import__("functools").partial, print),
    "ctypes": Call(__import__("ctypes").CDLL, "libc.so.6"),
    "copyreg": Call(__import__("copyreg")._reconstructor, object, object, None),
    "bytearray": Call(bytearray, 1 << 40),
    "setstate": Stateful(),
    "new with arguments": Constructed(),
    "dict subclass": Loud(),
    "object": Call(object),
    "complex": 3j,
    "set": {1, 2},
    "frozenset": frozenset((1,)),
    "bytes": b"raw",
    "torch dtype": torch.float32,
    "torch device": torch.device("cpu"),
    "torch size": torch.Size((1, 2)),
    "path": Path("/etc/passwd"),
    "hidden in a dict": {"model": {"a": Call(sentinel)}, "epoch": 1},
    "hidden in a key": {("a", 1): Call(sentinel)},
}

RAW = {
    "GLOBAL and REDUCE": b"\x80\x02c" + NAME + b")R.",
    "GLOBAL alone": b"c" + NAME + b".",
    "GLOBAL popped": b"c" + NAME + b"0}.",
    "INST": b"(i" + NAME + b".",
    "INST os.system": b"(" + TOUCH + b"ios\nsystem\n.",
    "OBJ": b"(c" + NAME + b"o.",
    "OBJ of an allowed name": b"(" + ORDERED + b"o.",
    "NEWOBJ of an allowed name": ORDERED + b")\x81.",
    "NEWOBJ_EX of an allowed name": ORDERED + b")}\x92.",
    "STACK_GLOBAL": b"\x80\x04" + text(__name__) + text("sentinel") + b"\x93)R.",
    "STACK_GLOBAL dotted": b"\x80\x04"
    + text("collections")
    + text("OrderedDict.__init__")
    + b"\x93)R.",
    "STACK_GLOBAL split elsewhere": b"\x80\x04"
    + text("collections.OrderedDict.fromkeys")
    + text("x")
    + b"\x93)R.",
    "STACK_GLOBAL of memo": b"\x80\x04"
    + text("os")
    + b"\x94"
    + text("system")
    + b"\x94h\x00h\x01\x93.",
    "STACK_GLOBAL without strings": b"\x80\x04K\x01K\x02\x93.",
    "STACK_GLOBAL of tuples": b"\x80\x04))\x93.",
    "GLOBAL with spaces": b"ccollections OrderedDict\nx\n)R.",
    "GLOBAL of an attribute": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    "GLOBAL of torch._utils.os": b"ctorch._utils\nos\n.",
    "GLOBAL of torch.os.system": b"ctorch\nos.system\n" + TOUCH + b"\x85R.",
    "EXT1": b"\x82\x01.",
    "EXT2": b"\x83\x01\x01.",
    "EXT4": b"\x84\x01\x01\x01\x01.",
    "PERSID": b"Pstorage\n.",
    "persistent id of a call": b"("
    + text("storage")
    + b"c"
    + NAME
    + text("0")
    + text("cpu")
    + b"K\x04tQ.",
    "persistent id with a name that is no storage": b"("
    + text("storage")
    + REBUILD
    + text("0")
    + text("cpu")
    + b"K\x04tQ.",
    "persistent id not a tuple": text("storage") + b"Q.",
    "persistent id with a negative size": storage(b"J\xff\xff\xff\xff") + b".",
    "persistent id with true as size": storage(b"\x88") + b".",
    "BUILD on a function": REBUILD + b"}b.",
    "BUILD on a tensor": tensor() + b"}" + text("shape") + b"K\x01sb.",
    "BUILD on a dict": b"}}b.",
    "BUILD with slots": ORDERED + b")R}}\x86b.",
    "REDUCE of a storage class": FLOAT + b")R.",
    "REDUCE of a string": text("os.system") + b")R.",
    "REDUCE of a tensor": tensor() + b")R.",
    "REDUCE with a list": ORDERED + b"]R.",
    "OrderedDict with arguments": ORDERED + b"(]tR.",
    "rebuild without arguments": REBUILD + b")R.",
    "rebuild without a storage": REBUILD + b"(}K\x00))\x89NtR.",
    "parameter of a dict": PARAMETER + b"(}\x88NtR.",
    "tensor beyond its storage": tensor(shape=b"(K\x05t") + b".",
    "tensor beyond by stride": tensor(strides=b"(K\x02t") + b".",
    "tensor beyond by offset": tensor(offset=b"K\x01") + b".",
    "tensor with negative offset": tensor(offset=b"J\xff\xff\xff\xff") + b".",
    "tensor with negative stride": tensor(strides=b"(J\xff\xff\xff\xfft") + b".",
    "tensor with true as size": tensor(shape=b"(\x88t") + b".",
    "tensor with text as size": tensor(shape=b"(" + text("4") + b"t") + b".",
    "tensor of other rank": tensor(strides=b"(K\x01K\x01t") + b".",
    "tensor of rank 99": tensor(
        shape=b"(" + b"K\x01" * 99 + b"t", strides=b"(" + b"K\x01" * 99 + b"t"
    )
    + b".",
    "huge integer": b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b".",
    "integer of 9 bytes": b"\x8a\x09" + b"\x7f" * 9 + b".",
    "decimal integer": b"I" + b"9" * 100_000 + b"\n.",
    "decimal long": b"L" + b"9" * 100_000 + b"L\n.",
    "string to evaluate": b"S'" + b"\\x41" * 9 + b"'\n.",
    "huge text": b"\x8d" + struct.pack("<Q", 1 << 62) + b"a.",
    "text beyond any platform": b"\x8d" + struct.pack("<Q", (1 << 64) - 1) + b"a.",
    "huge bytes": b"\x8e" + struct.pack("<Q", 1 << 40) + b"a.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"q.",
    "memo from nowhere": b"h\x07.",
    "memo far from nowhere": b"j\xff\xff\xff\xff.",
    "text memo": b"}p0\n0g0\n.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "read-only buffer": b"\x80\x05}\x98.",
    "DUP": b"}2.",
    "POP": b"}}0.",
    "POP_MARK": b"(1}.",
    "MARK left": b"(}.",
    "two values": b"}}.",
    "TUPLE without mark": b"t.",
    "stack underflow": b"\x85.",
    "underflow through a mark": b"}(\x85.",
    "memo of nothing": b"q\x00.",
    "APPEND to a tuple": b")K\x01a.",
    "APPENDS to a dict": b"}(K\x01e.",
    "SETITEM on a list": b"]K\x01K\x02s.",
    "SETITEM on a name": ORDERED + b"K\x01K\x02s.",
    "SETITEMS odd": b"}(K\x01u.",
    "key a tuple": b"})K\x02s.",
    "key nested deep": b"}" + b")" + b"\x85" * 20_000 + b"K\x02s.",
    "key a list": b"}]K\x02s.",
    "value nested deep": b")" + b"\x85" * 20_000 + b"}b.",
    "marks nested deep": b"(" * 20_000 + b".",
    "unknown opcode": b"\xff.",
    "no STOP": b"}",
    "cut argument": b"X\xff\x00\x00\x00abc",
    "not utf-8": b"X\x02\x00\x00\x00\xff\xfe.",
}

HOSTILE = {
    **{
        f"{name}, protocol {protocol}": made(value, protocol)
        for name, value in CALLS.items()
        for protocol in (2, 4)
    },
    **RAW,
}


def test_there_are_enough_of_them():
    assert len(HOSTILE) >= 150


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickle_runs_nothing(tmp_path, case, monkeypatch):
    real_import = builtins.__import__

    def watched_import(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
        # The reader has no imports of its own left, so any made in its frames is the pickle's.
        if str((globals or {}).get("__name__")).startswith("csm_jax"):
            RAN.append(f"import {name}")
        return real_import(name, globals, *rest, **named)

    write_zip(tmp_path / "f.pt", {"f/data.pkl": HOSTILE[case], "f/byteorder": b"little"})
    monkeypatch.setattr("os.system", sentinel)
    monkeypatch.setattr("subprocess.Popen", sentinel)
    monkeypatch.setattr("pickle.Unpickler", sentinel)
    RAN.clear()
    with monkeypatch.context() as patch:
        patch.setattr("builtins.__import__", watched_import)
        with pytest.raises(WeightsError, match=r"f\.pt: refused to read the pickle: "):
            TorchSource(tmp_path / "f.pt")
    assert RAN == []


def test_endless_pickle_is_refused(monkeypatch):
    monkeypatch.setattr("csm_jax.weights.pickle_machine.MAX_OPCODES", 1000)
    with pytest.raises(ValueError, match="more than 1,000 opcodes"):
        describe(b"N" * 1000 + b".")
    with pytest.raises(ValueError, match="unfinished object"):
        describe(b"N" * 999 + b".")


@pytest.mark.parametrize(
    "name", ["sentinel", "os.system", "eval", "getattr", "runpy", "torch.load"]
)
def test_refusal_says_the_dotted_name(name):
    dotted = {
        "sentinel": f"{__name__}.sentinel",
        "os.system": "posix.system",
        "eval": "builtins.eval",
        "getattr": "builtins.getattr",
        "runpy": "runpy.run_path",
        "torch.load": "torch.serialization.load",
    }[name]
    with pytest.raises(ValueError, match=f"it names '{dotted}'"):
        describe(HOSTILE[f"{name}, protocol 4"])
    with pytest.raises(ValueError, match=r"INST of 'os\.system'"):
        describe(RAW["INST os.system"])


def test_the_pieces_of_the_hostile_ones_are_right():
    """The same bytes without the hostile part are read: the tests above fail for the right reason."""
    tensor_read = describe(tensor() + b".")
    assert (tensor_read.shape, tensor_read.strides, tensor_read.offset) == ((4,), (1,), 0)
    assert describe(ORDERED + b")R}b.") == {}
    assert describe(PARAMETER + b"(" + tensor() + b"\x88" + ORDERED + b")RtR.").shape == (4,)
    pickle_of_sentinel = io.BytesIO(RAW["GLOBAL and REDUCE"])
    RAN.clear()
    pickle.load(pickle_of_sentinel)
    assert RAN == ["ran"]
    RAN.clear()
