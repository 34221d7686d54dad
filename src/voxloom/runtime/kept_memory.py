"""Memory that a network frees, kept for its next forward pass; and given back when the process grows beyond what was promised.

The C library gives large blocks back to the system as soon as they are freed, and the system clears each page before it hands
it out again. For a network on a CPU that takes as long as its arithmetic. Here the C library is told to keep what is freed; and
where that does not fit what comes next, so that the process grows, to give all of it back now and then.

Only the GNU C library knows how. With others, or an allocator such as jemalloc in its place, nothing is done.
"""

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .forks import in_forked_process
from .limits import free_bytes

__all__ = ["Trimmer", "allow", "begin_model", "judge", "kept_for_models", "kept_memory"]

# Parameters of `mallopt`, and what they are set to afterwards: what the library itself comes to where much memory is used.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 * 2**20, TRIM_THRESHOLD: 64 * 2**20}
MOST = 2**31 - 1
NAMES = {MMAP_MAX: "mmap_max", MMAP_THRESHOLD: "mmap_threshold", TRIM_THRESHOLD: "trim_threshold"}
# How many times its outputs a model must use, and how many bytes, for keeping memory to be of use: what is kept of less are gaps
# between outputs, or would be kept anyway.
LEAST_USE, LEAST_BYTES = 2, 64 * 2**20
# Outputs of this many bytes and more leave gaps that are looked at: the outputs of each call may lie in them, and are not given
# back to the system then. Asking for that takes tenths of a millisecond.
LEAST_GAP = 8 * 2**20
# Blocks of fewer bytes than this never come from the system one by one: that would be slow.
LEAST_MAPPED = 2**20
# How much more than a model used when it was called first may be kept: some patterns do not fit well into what is there.
GROWTH, GROWTH_BYTES = 0.3, 32 * 2**20
# How many times what a model used must be free beside all else for memory to be kept, which grows: later blocks do not fit well
# into what is there. Where a limit was given, it is what the model used when nothing was kept, which is about half.
ROOM, ROOM_OF_LIMIT = 2, 4
# By how much a process may grow at least before what is free is given back once more.
TRIM_BYTES = 8 * 2**20


@dataclass
class _Library:
    """The C library of this process."""

    mallopt: Callable[[int, int], int]
    trim: Callable[[int], int]

    @classmethod
    def find(cls) -> "_Library | None":
        if os.name != "posix":
            return None
        library: Any = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return None
        return cls(library.mallopt, library.malloc_trim)


@dataclass(eq=False)
class _User:
    """Someone who wants memory to be kept; of a prediction it turns out with its first forward pass whether that is of use."""

    resident_before: int
    """Bytes that the process held when the prediction began."""
    before_model: int | None = None
    """Those of its own, which are no part of a file, when a model was about to be called for the first time."""
    resident_before_model: int = 0
    """All that the process held then."""
    of_model: int | None = None
    """By how many bytes the process grew by that; None as long as no model was called."""
    is_served: bool = True
    """Whether memory is to be kept for it."""
    leaves_gaps: bool = False
    """Whether what was kept until it turned out to be of no use is still there."""
    gap_bytes: int = 0
    """How large the gaps are that stay when it is given back: room in which later outputs may lie."""
    limit: int | None = None
    """Bytes that may be used beside the model's own, as was given; nothing is kept before it is known that there is room."""
    room: int | None = None
    """Bytes that are left beside what is planned; None as long as that is not known, or nobody can say."""
    is_worth: bool = True
    """Whether the model uses so much memory that to keep it is of use."""


@dataclass
class _State:
    """Who wants memory to be kept, in this process."""

    users: set[_User] = field(default_factory=set)
    is_keeping: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


_library = _Library.find()
_state = _State()
_prediction: ContextVar[_User | None] = ContextVar("prediction", default=None)
"""The one that runs in this thread."""


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Let memory that is freed be kept for what follows, such as the next forward pass of a network on a CPU.

    A U-Net's passes take half the time then, with the same bits. The process keeps up to the most that it has used meanwhile, and
    gives it back in the end. It may be nested, and used by several threads. `predict` does it by itself, where it is of use.

    Example:
        >>> import torch, voxloom as vx
        >>> network = torch.nn.Conv3d(1, 4, kernel_size=3, padding=1)
        >>> with vx.kept_memory(), torch.inference_mode():
        ...     outputs = [network(torch.rand(1, 1, 32, 32, 32)).shape for _ in range(3)]
    """
    with _used(_User(_resident_bytes())):
        yield


@contextlib.contextmanager
def kept_for_models(device: torch.device, limit: int | None = None) -> Iterator[None]:
    """Let memory be kept for a prediction in this thread, as far as `judge` finds that this is of use, and there is room.

    It is kept from the first forward pass on: what is read, decoded and resampled before is given back at once.

    Args:
        device: where the model runs; nothing is kept but for the CPU.
        limit: bytes that may be used beside the model's own, if that was given.
    """
    if device.type != "cpu":
        yield
        return
    with _used(_User(_resident_bytes(), is_served=False, limit=limit)) as user:
        before = _prediction.set(user)
        try:
            yield
        finally:
            _prediction.reset(before)


@contextlib.contextmanager
def _used(user: _User) -> Iterator[_User]:
    state = _state
    with state.lock:
        state.users.add(user)
        _follow(state)
    try:
        yield user
    finally:
        with state.lock:
            state.users.discard(user)
            _follow(state)
        if _library is not None and user.leaves_gaps:
            _library.trim(0)


def _follow(state: _State, largest: int = USUAL[MMAP_THRESHOLD]) -> None:
    """Do as the users want.

    Args:
        state: the users.
        largest: bytes of blocks which come from the system each time, where memory is not kept.
    """
    was_keeping, state.is_keeping = state.is_keeping, any(user.is_served for user in state.users)
    if _library is None or (was_keeping and state.is_keeping):
        return
    if state.is_keeping:
        _library.mallopt(MMAP_MAX, 0)
        _library.mallopt(TRIM_THRESHOLD, -1)
        return
    for parameter, usual in (USUAL | {MMAP_THRESHOLD: largest}).items():
        _library.mallopt(parameter, _chosen(parameter, usual))
    if was_keeping:
        _library.trim(0)


def _chosen(parameter: int, usual: int) -> int:
    """Give what the user has chosen for a parameter, if anything."""
    name = NAMES[parameter]
    tunables = dict(part.partition("=")[::2] for part in os.environ.get("GLIBC_TUNABLES", "").split(":"))
    given = tunables.get(f"glibc.malloc.{name}") or os.environ.get(f"MALLOC_{name.upper()}_")  # as the library has it, given both
    try:
        number = usual if given is None else int(given, 0)
    except ValueError:
        return usual
    return number if number <= MOST else -1  # which is without end


def begin_model(has_freed: bool = False) -> None:
    """Before a model is called: give back what would count as its use of memory, or what it left if nothing is kept for it.

    Args:
        has_freed: whether outputs of the same batch have just been freed, such as those of another model.
    """
    user = _prediction.get()
    if _library is None or user is None:
        return
    fills_gaps = has_freed and user.gap_bytes >= LEAST_GAP
    if not (user.before_model is None or user.leaves_gaps or fills_gaps):
        return
    _library.trim(0)
    user.leaves_gaps = False
    if user.before_model is None:
        user.before_model, user.resident_before_model = _own_bytes(), _resident_bytes()
        with _state.lock:
            user.is_served = user.limit is None
            _follow(_state)


def judge(output_bytes: int) -> None:
    """After a model was called for the first time: keep memory for it only if that is of use, and there is room.

    Args:
        output_bytes: what the outputs take of the heap.
    """
    user = _prediction.get()
    if _library is None or user is None or user.of_model is not None or user.before_model is None:
        return
    with _state.lock:
        user.of_model = _own_bytes() - user.before_model
        if user.limit is not None:  # what it used has been given back by now
            user.of_model = max(user.of_model, _most_bytes() - user.resident_before_model)
        user.gap_bytes = output_bytes
        user.is_worth = user.of_model > max(LEAST_USE * output_bytes, LEAST_BYTES)
        _settle(user)


def allow(planned: int) -> None:
    """Say what a prediction will use beside the model's own, so that memory is kept only where there is room for it, too."""
    user = _prediction.get()
    if _library is None or user is None:
        return
    most = free_bytes() if user.limit is None else user.limit
    with _state.lock:
        user.room = None if most is None else max(0, most - planned)
        if user.of_model is not None:
            _settle(user)


def _settle(user: _User) -> None:
    """Keep memory for a prediction or not, by what its model used."""
    assert user.of_model is not None
    was_served = user.is_served
    if user.limit is None:
        has_room = user.room is None or ROOM * user.of_model <= user.room
    else:
        has_room = user.room is not None and ROOM_OF_LIMIT * user.of_model <= user.room
    user.is_served = user.is_worth and has_room
    if user.is_served:
        _follow(_state)
        return
    user.leaves_gaps = user.leaves_gaps or was_served  # which are still in use
    # Blocks of some size would otherwise leave gaps as large; smaller ones are as quick as ever.
    _follow(_state, min(max(user.gap_bytes // 4, LEAST_MAPPED), USUAL[MMAP_THRESHOLD]))


class Trimmer:
    """Keeps a process within a bound, beside what a model itself uses and what is kept for it.

    Args:
        num_bytes: by how much the process may grow, from when the prediction began.
    """

    def __init__(self, num_bytes: int) -> None:
        self._step = max(num_bytes // 100, TRIM_BYTES)
        user = _prediction.get()
        self._bound = num_bytes + (_resident_bytes() if user is None else user.resident_before)

    def check(self, coming: int = 0) -> None:
        """Give back what is free if the process has grown too large; costs hardly anything otherwise.

        Args:
            coming: bytes that may be taken before it is asked again, beside the model's.
        """
        if _library is None:
            return
        with _state.lock:
            of_models = sum(user.of_model or 0 for user in _state.users if user.is_served)
            kept = of_models * (1 + GROWTH) + GROWTH_BYTES if _state.is_keeping else 0
        if _resident_bytes() + coming <= self._bound + kept:
            return
        _library.trim(0)
        in_use = _resident_bytes() + coming
        if in_use > self._bound + kept:  # asking again at once would be of no use
            self._bound = in_use + self._step


def _resident_bytes() -> int:
    return _pages()[0] * mmap.PAGESIZE


def _most_bytes() -> int:
    """The most that the process has held so far; 0 where the system does not say."""
    try:
        with open("/proc/self/status", "rb") as file:  # noqa: PTH123 - as below
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(b"VmHWM:")), 0)
    except OSError:
        return 0


def _own_bytes() -> int:
    """Resident memory that is no part of a file: what a reader maps meanwhile is not the model's."""
    resident, shared = _pages()
    return (resident - shared) * mmap.PAGESIZE


def _pages() -> tuple[int, int]:
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - each batch asks
            _, resident, shared, *_ = file.read().split()
            return int(resident), int(shared)
    except OSError:
        return 0, 0


@in_forked_process
def _start_anew() -> None:
    """In a forked process nobody keeps memory any more, nor holds the lock."""
    global _state
    _state = _State(is_keeping=_state.is_keeping)
    if _state.is_keeping:
        _follow(_state)
