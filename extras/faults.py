"""What surrounds a run: its folder's lock, disk space reserved, and why other processes ended.

The core asks for these by `data.optional("faults")`. Without this file two runs may share a folder, a full
disk may be a bus error, and of two processes one may end without a word on the other; nothing else changes.

    python -m extras.faults RUN ...         who has these run folders
"""
import collections
import contextlib
import errno
import fcntl
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch.distributed as dist

import data

# ---- 1. One run in a folder ----

KILLED = "a process that reads data was killed, for want of memory? Use fewer --workers"
_held: set[Path] = set()


@contextlib.contextmanager
def lock(folder: Path):
    """Hold the folder, on process 0, until the end of the block; ValueError where another run is alive in it.

    A POSIX lock of the file .lock: it goes with its process, however that ends, and worker processes do not
    inherit it. A folder that the block leaves empty is removed.
    """
    folder = folder.resolve()
    if folder in _held or int(os.environ.get("RANK", 0)):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise BlockingIOError(errno.EAGAIN, "another process took it in between")
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
                raise OSError(f"{folder}: cannot be locked ({error.strerror}); give another --out") from error
            raise ValueError(f"{folder}: {owner(path)} is at work there: wait for its end, or give another "
                             "--out") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _held.add(folder)
        try:
            yield
        finally:
            _held.discard(folder)
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()


def owner(path: Path) -> str:
    """The process that wrote a lock, in words."""
    with contextlib.suppress(OSError):
        if pid := path.read_text(errors="replace").strip():
            return f"process {pid[:20]}"
    return "another process"


# ---- 2. Disk space, and data ----


def reserve(path: Path, mode: str, dtype, shape: tuple) -> np.memmap:
    """A new .npy file of zeros, mapped from disk, whose space is there: a full disk is an OSError here, not a
    bus error later."""
    try:
        rows = np.lib.format.open_memmap(path, mode, dtype, shape)
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        path.unlink(missing_ok=True)
        need = np.dtype(dtype).itemsize * np.prod(shape, dtype=float) / 1e9
        raise OSError(f"{path}: {need:.3g} GB cannot be written ({error.strerror}): free disk space, or "
                      "give another --out") from error
    return rows


def ahead(stream, cfg, stop):
    """The stream of a run, read a step ahead; its error waits in stop.failed until all before is used."""
    ready, more = collections.deque(), True
    while True:
        try:
            while more and len(ready) <= cfg.accumulation:
                ready.append(next(stream))
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's raises in mid-step
        except StopIteration:
            more = False
        except Exception as error:  # ValueError of a file, RuntimeError of a worker that died
            killed = isinstance(error, (ConnectionError, EOFError)) or "DataLoader worker" in str(error)
            stop.failed, more = ValueError(KILLED) if killed else error, False
        if ready:
            yield ready.popleft()
        elif stop.failed:
            raise stop.failed
        else:
            return


# ---- 3. The end of a process: signals, and why another ended ----


def store():
    """What the processes of torchrun share, besides tensors."""
    return dist.distributed_c10d._get_default_store()


def report(text: str) -> None:
    """Tell the other processes why this one ends."""
    with contextlib.suppress(Exception):  # the store may be gone
        if not store().check(["failed"]):
            store().set("failed", text)


def why(seconds: float = 5.0) -> str:
    """Which of the other processes ended, and why: as it told, or as its absence tells."""
    end, others = time.monotonic() + seconds, {*range(dist.get_world_size())} - {dist.get_rank()}
    with contextlib.suppress(Exception):
        while time.monotonic() < end:
            if store().check(["failed"]):
                return store().get("failed").decode(errors="replace")
            for k in others:
                if store().check([f"pid {k}"]) and ended(store().get(f"pid {k}")):
                    return f"rank {k} is gone (killed, perhaps for want of memory)"
            time.sleep(0.1)
    return "another process ended without a reason"


def ended(where: bytes) -> bool:
    """Whether a process of this machine has ended."""
    node, pid = where.decode().split()
    if node != os.uname().nodename:
        return False
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return not Path(f"/proc/{pid}").exists()


def listen() -> None:
    """SIGTERM and SIGHUP end a script as Ctrl-C does, unless they are ignored (nohup).

    Under torchrun once processes have met: until then they wait in ways that only their end stops.
    """
    def interrupt(number, _frame):
        raise KeyboardInterrupt(signal.Signals(number).name)

    if "RANK" in os.environ and not dist.is_initialized():
        return
    for number in data.ENDS[1:]:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, interrupt)
    if dist.is_initialized():
        store().set(f"pid {dist.get_rank()}", f"{os.uname().nodename} {os.getpid()}")


def told(error: BaseException) -> str:
    """The line for an error that is not ours; "" for a bug."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        text = f"interrupted{text and ' by '}{text}"
    elif isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
        text = f"out of memory: use a smaller --batch, --size or network ({text[:150]})"
    elif "home directory" in text:
        text += ": let TRIFLOW_CACHE name a folder that can be written"
    elif "DataLoader worker" in text:
        text = KILLED
    elif dist.is_initialized() and isinstance(error, (RuntimeError, ConnectionError)):  # of a collective
        return f"another process ended: {why()}"
    elif not isinstance(error, (ValueError, OSError)):
        return ""
    if dist.is_initialized():
        report(f"rank {dist.get_rank()}: {text}")
    traceback.clear_frames(error.__traceback__)  # a progress bar there ends its line before ours
    return text


def main(argv: list[str] | None = None) -> None:
    for name in sys.argv[1:] if argv is None else argv:
        path = Path(name, ".lock")
        print(f"{name}: {owner(path) if path.exists() else 'nobody'}")


if __name__ == "__main__":
    data.run_cli(main)
