"""What code under test may do to the process it runs in, to the socket it finds there and to the machine."""

import json
import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

SLEEPS = "import time; time.sleep(3600)"


def sockets() -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                yield int(name)
        except OSError:
            continue


def write(data: bytes) -> float:
    for descriptor in sockets():
        os.write(descriptor, data)
    return 1.0


def write_and_hang(data: bytes) -> None:
    write(data)
    time.sleep(3600)


def framed(**fields: object) -> bytes:
    verdict = {"number": 1, "reward": 1.0, "failure": "", "detail": "", "location": "", **fields}
    message = json.dumps(verdict).encode()
    return struct.pack("!I", len(message)) + message


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import os; open(str(os.getpid()), 'w').close()",)


def pickled() -> float:
    data = pickle.dumps(Evil())
    return write(struct.pack("!I", len(data)) + data)


def flood() -> None:
    while True:
        write(b"y" * 65536)


def trickle() -> None:
    write(struct.pack("!I", 1000))
    while True:
        write(b"x")
        time.sleep(0.1)


def later(action: Callable[[], object]) -> float:
    threading.Timer(0.05, action).start()
    return 1.0


def close_sockets() -> None:
    for descriptor in list(sockets()):
        os.close(descriptor)
    time.sleep(3600)


def kill_keeper() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)


def stop_keeper() -> float:
    os.kill(os.getppid(), signal.SIGSTOP)
    return 1.0


def raise_new_kind() -> None:
    raise type(f"Kind{time.monotonic_ns()}", (Exception,), {})


def odd_words() -> None:
    raise type("E\x1b\n", (Exception,), {})("\x1b[2J\x9b\u202exrl: error: forged")


def take_memory() -> None:
    held = []
    while True:
        held.append(bytearray(16 << 20))


def take_shared_memory() -> None:
    held = []
    while True:
        held.append(mmap.mmap(-1, 16 << 20))
        held[-1].write(b"x" * (16 << 20))


def take_processes() -> None:
    for _ in range(200):
        if os.fork() == 0:
            time.sleep(3600)
    time.sleep(3600)


def write_large_file(path: str) -> None:
    with open(path, "wb") as file:
        while True:
            file.write(b"x" * 500_000)


def note(path: str, pid: int) -> None:
    with open(path, "w") as file:
        file.write(f"{pid}\n")


def start_session(path: str) -> float:
    note(path, subprocess.Popen([sys.executable, "-c", SLEEPS], start_new_session=True).pid)
    return 1.0


def start_session_and_exit(path: str) -> None:
    start_session(path)
    os._exit(7)


def fork_twice(path: str) -> float:
    """A child of nobody, in a session of its own."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            note(path, os.getpid())
            time.sleep(3600)
        os._exit(0)
    return 1.0


def print_both() -> float:
    print("on stdout")
    print("on stderr", file=sys.stderr)
    return 1.0


def print_much() -> float:
    print("x" * 12_000_000)
    return 1.0


ACTIONS: Mapping[str, Callable[[], object]] = {
    "pickle": pickled,
    "wrong length": lambda: write_and_hang(b"\xff\xff\xff\xff"),
    "flood": flood,
    "answer another question": lambda: write_and_hang(framed(number=999)),
    "infinite reward": lambda: write_and_hang(framed(reward=float("inf"))),
    "too large a reward": lambda: 1e308,
    "half a message": lambda: write_and_hang(framed()[:-1]),
    "byte now and then": trickle,
    "close the socket": close_sockets,
    "speak later": lambda: later(lambda: write(framed())),
    "stop reading": lambda: later(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "raise a new kind": raise_new_kind,
    "odd words": odd_words,
    "take memory": take_memory,
    "take shared memory": take_shared_memory,
    "take processes": take_processes,
    "secrets": lambda: float("HF_TOKEN" in os.environ),
    "MY_API_KEY": lambda: float("MY_API_KEY" in os.environ),
    "print": print_both,
    "print much": print_much,
}
WITH_A_FILE: Mapping[str, Callable[[str], object]] = {
    "write a large file": write_large_file,
    "start a session": start_session,
    "start a session and exit": start_session_and_exit,
    "fork twice": fork_twice,
    "stop the keeper": lambda _: stop_keeper(),
    "kill the keeper": lambda _: kill_keeper(),
}
