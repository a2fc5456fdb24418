"""What a pickle written by `torch.save` describes, found without executing anything.

Python's unpickler imports and calls whatever a pickle names. Here the opcodes are walked by a small
machine of our own that knows only those torch writes for tensors, dicts, lists and numbers: it never
imports a name and never calls anything; it compares names with a short list and notes inert records.
Any other opcode or name is refused.

Sources: CPython `pickletools` (opcodes), PyTorch `_utils.py` (arguments of the rebuild functions).
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_OPCODES = 200_000
"""CSM-1B's pickle has about 8,000, with optimiser state some 30,000; each takes microseconds."""
MAX_INT_BYTES = 8
MAX_RANK = 32

# Storage class -> (dtype, bytes per element). Types a model may not have are known too, so that
# they are reported by the name of the tensor.
_STORAGES: Mapping[str, tuple[str, int]] = {
    "torch.FloatStorage": ("float32", 4),
    "torch.BFloat16Storage": ("bfloat16", 2),
    "torch.HalfStorage": ("float16", 2),
    "torch.DoubleStorage": ("float64", 8),
    "torch.LongStorage": ("int64", 8),
    "torch.IntStorage": ("int32", 4),
    "torch.ShortStorage": ("int16", 2),
    "torch.CharStorage": ("int8", 1),
    "torch.ByteStorage": ("uint8", 1),
    "torch.BoolStorage": ("bool", 1),
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_ALLOWED = frozenset((*_STORAGES, _ORDERED_DICT, _TENSOR, _PARAMETER))


@dataclass(frozen=True, eq=False)
class Name:
    """A name the pickle mentions: only ever compared, never looked up."""

    dotted: str


@dataclass(frozen=True, eq=False)
class Storage:
    """A reference to a record of raw bytes."""

    key: str
    dtype: str
    itemsize: int
    size: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A strided view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one after the other in C order."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last one used."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))


class StateDict(dict):
    """An OrderedDict of the pickle."""


class _Refused(ValueError):
    """Something in the pickle that is not read."""


_Op = Callable[["_Machine", Any], None]
_OPS: dict[str, _Op] = {}


def _op(*names: str) -> Callable[[_Op], _Op]:
    def register(function: _Op) -> _Op:
        _OPS.update(dict.fromkeys(names, function))
        return function

    return register


class _Machine:
    """Stack, marks and memo of the pickle being walked."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise _Refused("an opcode takes more than the stack holds")
        return self.stack.pop()

    def top(self, wanted: type) -> Any:
        value = self.pop()
        self.push(value)
        if not isinstance(value, wanted):
            raise _Refused(f"an opcode for a {wanted.__name__} is applied to a {kind(value)}")
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise _Refused("an opcode needs a mark and there is none")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values


def kind(value: Any) -> str:
    """Returns a short name of what a value is."""
    # Never repr() of an unknown value: it may be nested deep enough to overflow the stack.
    return value.dotted if isinstance(value, Name) else type(value).__name__


def _no_effect(machine: _Machine, argument: Any) -> None:
    """PROTO and FRAME say nothing about the objects."""


_OPS.update(dict.fromkeys(("PROTO", "FRAME"), _no_effect))


@_op("MARK")
def _mark(machine: _Machine, argument: Any) -> None:
    machine.marks.append(len(machine.stack))


@_op("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "BINFLOAT")
def _literal(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


@_op("LONG1")
def _long(machine: _Machine, argument: int) -> None:
    if argument.bit_length() > 8 * MAX_INT_BYTES:
        raise _Refused("an integer of more than 64 bits")
    machine.push(argument)


@_op("NONE")
def _none(machine: _Machine, argument: Any) -> None:
    machine.push(None)


@_op("NEWTRUE")
def _true(machine: _Machine, argument: Any) -> None:
    machine.push(True)


@_op("NEWFALSE")
def _false(machine: _Machine, argument: Any) -> None:
    machine.push(False)


@_op("EMPTY_DICT")
def _empty_dict(machine: _Machine, argument: Any) -> None:
    machine.push({})


@_op("EMPTY_LIST")
def _empty_list(machine: _Machine, argument: Any) -> None:
    machine.push([])


@_op("EMPTY_TUPLE")
def _empty_tuple(machine: _Machine, argument: Any) -> None:
    machine.push(())


@_op("TUPLE")
def _tuple(machine: _Machine, argument: Any) -> None:
    machine.push(tuple(machine.pop_to_mark()))


def _short_tuple(size: int) -> _Op:
    def build(machine: _Machine, argument: Any) -> None:
        values = [machine.pop() for _ in range(size)]
        machine.push(tuple(reversed(values)))

    return build


_OPS.update({f"TUPLE{size}": _short_tuple(size) for size in (1, 2, 3)})


@_op("BINPUT", "LONG_BINPUT")
def _put(machine: _Machine, argument: int) -> None:
    machine.memo[argument] = machine.top(object)


@_op("MEMOIZE")
def _memoize(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo)] = machine.top(object)


@_op("BINGET", "LONG_BINGET")
def _get(machine: _Machine, argument: int) -> None:
    if argument not in machine.memo:
        raise _Refused(f"memo entry {argument} is used before it is set")
    machine.push(machine.memo[argument])


@_op("APPEND")
def _append(machine: _Machine, argument: Any) -> None:
    value = machine.pop()
    machine.top(list).append(value)


@_op("APPENDS")
def _appends(machine: _Machine, argument: Any) -> None:
    values = machine.pop_to_mark()
    machine.top(list).extend(values)


@_op("SETITEM")
def _setitem(machine: _Machine, argument: Any) -> None:
    value, key = machine.pop(), machine.pop()
    _set_items(machine.top(dict), [key, value])


@_op("SETITEMS")
def _setitems(machine: _Machine, argument: Any) -> None:
    pairs = machine.pop_to_mark()
    _set_items(machine.top(dict), pairs)


def _set_items(target: dict[Any, Any], pairs: list[Any]) -> None:
    if len(pairs) % 2:
        raise _Refused("a dict is given a key without a value")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        # Hashing anything nested could recurse without bound.
        if not isinstance(key, (str, int)):
            raise _Refused(f"a dict has a {kind(key)} as key")
        target[key] = value


@_op("GLOBAL")
def _global(machine: _Machine, argument: str) -> None:
    machine.push(_allowed_name(argument.replace(" ", ".", 1)))


@_op("STACK_GLOBAL")
def _stack_global(machine: _Machine, argument: Any) -> None:
    attribute, module = machine.pop(), machine.pop()
    if not isinstance(attribute, str) or not isinstance(module, str):
        raise _Refused("STACK_GLOBAL without two strings")
    machine.push(_allowed_name(f"{module}.{attribute}"))


def _allowed_name(dotted: str) -> Name:
    if dotted not in _ALLOWED:
        raise _Refused(
            f"it names {dotted[:200]!r}, which is not needed for tensors; it was neither "
            "imported nor called"
        )
    return Name(dotted)


@_op("BINPERSID")
def _persistent(machine: _Machine, argument: Any) -> None:
    reference = machine.pop()
    match reference:
        case ("storage", Name(dotted=name), str(key), str(), int(size)) if (
            name in _STORAGES and not isinstance(size, bool) and size >= 0
        ):
            dtype, itemsize = _STORAGES[name]
            machine.push(Storage(key, dtype, itemsize, size))
        case _:
            raise _Refused("a persistent id is not torch's reference to a storage")


@_op("REDUCE")
def _reduce(machine: _Machine, argument: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise _Refused(f"a {kind(function)} is called")
    match function.dotted, arguments:
        case ("collections.OrderedDict", ()):
            machine.push(StateDict())
        case (
            "torch._utils._rebuild_tensor_v2",
            (Storage() as storage, offset, tuple(shape), tuple(strides), bool(), *rest),
        ) if len(rest) in (1, 2):
            machine.push(_tensor(storage, offset, shape, strides))
        case ("torch._utils._rebuild_parameter", (Tensor() as tensor, bool(), _)):
            machine.push(tensor)
        case _:
            raise _Refused(f"{function.dotted} has arguments torch does not write")


def _tensor(storage: Storage, offset: Any, shape: Any, strides: Any) -> Tensor:
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > MAX_RANK:
        raise _Refused("a tensor's shape and strides do not match")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise _Refused("a tensor's offset, shape or strides are not sizes")
    tensor = Tensor(storage, offset, shape, strides)
    if offset + tensor.span > storage.size:
        raise _Refused(
            f"a tensor reaches to element {offset + tensor.span} of storage {storage.key[:40]!r}, "
            f"which has {storage.size}"
        )
    return tensor


@_op("BUILD")
def _build(machine: _Machine, argument: Any) -> None:
    # A Module's state dict carries the attribute `_metadata` (version numbers): dropped.
    state = machine.pop()
    target = machine.top(object)
    if not isinstance(target, StateDict) or not isinstance(state, dict):
        raise _Refused(f"attributes are set on a {kind(target)}")


def describe(pickle: bytes) -> Any:
    """Returns what a pickle written by `torch.save` describes: dicts, lists, numbers and records.

    Args:
        pickle: The record `data.pkl`.

    Raises:
        ValueError: The pickle is damaged, or holds anything besides tensors and plain values; the
            name or opcode is given. Nothing it names has been imported or called.
    """
    machine = _Machine()
    walked = pickletools.genops(io.BytesIO(pickle))
    for count, (opcode, argument, position) in enumerate(walked):
        if count == MAX_OPCODES:
            raise _Refused(f"the pickle has more than {MAX_OPCODES:,} opcodes")
        if opcode.name == "STOP":
            if len(machine.stack) != 1 or machine.marks:
                raise _Refused("the pickle ends with an unfinished object")
            return machine.stack[0]
        operation = _OPS.get(opcode.name)
        if operation is None:
            about = str(argument)[:200].replace(" ", ".", 1)
            named = f" of {about!r}" if opcode.name in ("INST", "EXT1", "EXT2", "EXT4") else ""
            raise _Refused(
                f"opcode {opcode.name}{named} at byte {position} is not one torch writes for tensors"
            )
        operation(machine, argument)
    raise _Refused("the pickle has no end")
