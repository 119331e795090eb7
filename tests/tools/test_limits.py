"""Programs that take too much: each is ended in time, and nothing of it is left."""

import concurrent.futures
import re
from dataclasses import replace

import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.tools.limits import Limits

LIMITS = Limits(
    cpu_seconds=5.0,
    wall_seconds=20.0,
    memory_bytes=64 << 20,
    max_processes=12,
    file_bytes=8 << 20,
    output_bytes=50_000,
)

# Programs that take too much: name, how they end, what they say until then (a pattern), and what they do.
GREED = [
    (
        "fork bomb",
        "timeout",
        "",
        """
        while True:
            try: os.fork()
            except OSError: pass
    """,
    ),
    (
        "fork bomb that sleeps",
        "ok",
        "refused after 11 BlockingIOError EAGAIN",
        """
        until_refused(lambda i: os.fork() or time.sleep(60))
    """,
    ),
    (
        "fork bomb of a shell",
        "timeout|error|killed",
        None,
        """
        os.execvp("sh", ["sh", "-c", "f() { f | f & }; f; sleep 60", TOKEN])
    """,
    ),
    (
        "comet",
        "ok",
        "",
        """
        while True:
            if os.fork(): os._exit(0)
    """,
    ),
    (
        "thread bomb",
        "ok",
        "refused after ([1-9]|1[01]) RuntimeError None",
        """
        until_refused(lambda i: threading.Thread(target=time.sleep, args=(60,), daemon=True).start())
        os._exit(0)
    """,
    ),
    (
        "balloon",
        "ok",
        "refused after [0-9]{2} MemoryError None",
        """
        held = []
        until_refused(lambda i: held.append(bytearray(1 << 20)), 1000)
    """,
    ),
    (
        "balloon of mapped memory",
        "ok",
        "refused after [0-9]{2} (OSError ENOMEM|MemoryError None)",
        """
        held = []
        def take(i):
            held.append(mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            held[-1].write(bytes(1 << 20))
        until_refused(take, 1000)
    """,
    ),
    (
        "balloons of many processes",
        "memory",
        "",
        """
        for _ in range(6):
            if os.fork() == 0: break
        held = bytearray(30 << 20)
        time.sleep(60)
    """,
    ),
    (
        "balloons of processes that hide",
        "memory",
        "",
        """
        for _ in range(6):
            if os.fork() == 0: break
        call(libc.prctl(4, 0, 0, 0, 0))  # not dumpable: its /proc belongs to root
        held = bytearray(30 << 20)
        time.sleep(60)
    """,
    ),
    (
        "deep recursion",
        "error|killed",
        "",
        """
        sys.setrecursionlimit(1 << 30)
        def down(n): return repr([down(n + 1)])
        down(0)
    """,
    ),
    (
        "shared memory",
        "ok",
        "refused after 8 OSError ENOSPC",
        """
        file = open(f"/dev/shm/{TOKEN}", "wb", buffering=0)
        until_refused(lambda i: open(f"/dev/shm/{TOKEN}{i}", "wb", buffering=0).write(bytes(1 << 20)))
    """,
    ),
    (
        "disk in /tmp",
        "ok",
        "refused after [78] OSError ENOSPC",
        """
        def put(i):
            with open(f"/tmp/{TOKEN}{i}", "wb", buffering=0) as file:
                for _ in range(16): file.write(bytes(1 << 16))
        until_refused(put)
    """,
    ),
    (
        "disk in the working directory",
        "ok",
        "refused after [0-9]+ OSError (ENOSPC|EFBIG)",
        """
        file = open("big", "wb", buffering=0)
        until_refused(lambda i: file.write(bytes(1 << 16)))
    """,
    ),
    (
        "one file beyond the limit",
        "ok",
        "refused after 0 OSError EFBIG",
        """
        file = open("big", "wb")
        until_refused(lambda i: (file.seek(9 << 20), file.write(b"x"), file.flush()))
        os._exit(0)
    """,
    ),
    (
        "sparse file",
        "ok",
        "refused after 0 OSError EFBIG",
        """
        file = open("sparse", "w")
        until_refused(lambda i: os.truncate(file.fileno(), 1 << 40))
    """,
    ),
    (
        "deleted files that stay open",
        "ok",
        "refused after [0-9]+ OSError ENOSPC",
        """
        held = []
        def put(i):
            held.append(open("deleted", "wb", buffering=0))
            os.unlink("deleted")
            held[-1].write(bytes(1 << 18))
            held[-1].write(bytes(1 << 18))
        until_refused(put)
    """,
    ),
    (
        "many empty files",
        "memory",
        "",
        """
        for i in range(10_000_000): os.close(os.open(f"/tmp/{i}", os.O_CREAT))
    """,
    ),
    (
        "many folders",
        "memory",
        "",
        """
        while True:
            os.mkdir("d")
            os.chdir("d")
    """,
    ),
    (
        "endless stdout",
        "output",
        None,
        """
        while True: os.write(1, b"x" * 4096)
    """,
    ),
    (
        "endless stderr",
        "output",
        None,
        """
        while True: os.write(2, b"x" * 4096)
    """,
    ),
    (
        "endless output of many processes",
        "output",
        None,
        """
        for _ in range(3): os.fork()
        while True: os.write(1, b"\\xff" * 4096), os.write(2, b"\\0" * 4096)
    """,
    ),
    (
        "one huge line",
        "output",
        None,
        """
        sys.stdout.write("x" * (10 << 20))
    """,
    ),
    (
        "open files",
        "ok",
        "refused after 2[0-9]{2} OSError EMFILE",
        """
        until_refused(lambda i: os.dup(0))
    """,
    ),
    (
        "pipes",
        "ok",
        "refused after 1[0-9]{2} OSError EMFILE",
        """
        until_refused(lambda i: os.pipe())
    """,
    ),
    (
        "busy loop",
        "timeout",
        "",
        """
        while True: pass
    """,
    ),
    (
        "busy loop that ignores signals",
        "timeout",
        "",
        """
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
        while True: pass
    """,
    ),
    (
        "busy loops of many processes",
        "timeout",
        "",
        """
        for _ in range(3): os.fork()
        while True: pass
    """,
    ),
    (
        "sleep",
        "timeout",
        "",
        """
        time.sleep(60)
    """,
    ),
    (
        "closed descriptors, then sleep",
        "timeout",
        "",
        """
        os.closerange(0, 100)
        time.sleep(60)
    """,
    ),
    (
        "stopping itself",
        "timeout",
        "",
        """
        os.kill(os.getpid(), signal.SIGSTOP)
    """,
    ),
    (
        "waiting for input",
        "ok",
        "0",
        """
        say(len(sys.stdin.read()))
    """,
    ),
    (
        "daemon",
        "ok",
        "left",
        """
        if os.fork() == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
            if os.fork() == 0:
                os.closerange(0, 100)
                time.sleep(60)
            os._exit(0)
        os.wait()
        say("left")
    """,
    ),
    (
        "children that hold the output",
        "ok",
        "left",
        """
        for _ in range(5):
            if os.fork() == 0: time.sleep(60)
        say("left")
    """,
    ),
    (
        "children that go on writing",
        "ok|output",
        None,
        """
        if os.fork() == 0:
            while True: os.write(1, b"x")
    """,
    ),
    (
        "killing everything",
        "killed",
        "",
        """
        if os.fork() == 0: os.kill(-1, signal.SIGKILL)
        time.sleep(60)
    """,
    ),
    (
        "killing its first process",
        "ok",
        "alive",
        """
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
            try: os.kill(1, number)
            except PermissionError: pass
        say("alive")
    """,
    ),
    (
        "killing itself",
        "killed",
        "",
        """
        os.kill(os.getpid(), signal.SIGKILL)
    """,
    ),
    (
        "reading address 0",
        "killed",
        "",
        """
        ctypes.string_at(0)
    """,
    ),
    (
        "abort",
        "killed",
        "",
        """
        os.abort()
    """,
    ),
    (
        "running a privileged program",
        "ok",
        "1|",
        """
        assert os.statvfs("/usr").f_flag & os.ST_NOSUID
        shown = subprocess.run(["su", "-c", "id -u; cat /etc/shadow"], capture_output=True, text=True)
        say(shown.returncode, shown.stdout)
    """,
    ),
    (
        "a setuid file of its own",
        "ok",
        "False",
        """
        subprocess.run(["cp", "/usr/bin/id", "/tmp/id"], check=True)
        os.chmod("/tmp/id", 0o6755)
        say(subprocess.run(["/tmp/id", "-u"], capture_output=True).stdout == b"0\\n")
    """,
    ),
]


@pytest.mark.parametrize(("status", "said", "program"), [case[1:] for case in GREED], ids=[case[0] for case in GREED])
def test_greed_ends(host, status, said, program):
    # Time is short where it shall run out, and plenty where another limit shall be met first.
    limits = replace(LIMITS, cpu_seconds=0.7, wall_seconds=1.5) if "timeout" in status else LIMITS
    result = host.attack(program, limits)
    assert re.fullmatch(status, result.status), result
    assert result.wall_seconds < limits.wall_seconds + 3
    written = len(result.stdout) + len(result.stderr)
    assert written == limits.output_bytes if result.status == "output" else written <= limits.output_bytes
    if said is not None:
        assert re.fullmatch(said, result.stdout.strip()), result


def test_shared_memory_counts_once(host):
    program = """
        held = bytearray(30 << 20)
        children = [os.fork() or time.sleep(0.5) or os._exit(0) for _ in range(6)]
        say([os.waitstatus_to_exitcode(os.wait()[1]) for _ in children])
    """
    result = host.attack(program, LIMITS)
    assert (result.status, result.stdout) == ("ok", "[0, 0, 0, 0, 0, 0]\n"), result


def test_eight_attacks_at_once(host):
    names = ["fork bomb", "balloons of many processes", "many empty files", "endless stdout"] * 2
    programs = {case[0]: (case[1], case[3]) for case in GREED}
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        results = list(pool.map(lambda name: host.attack(programs[name][1], LIMITS), names))
    assert [result.status for result in results] == [programs[name][0] for name in names]


@pytest.mark.parametrize(
    "field", ["cpu_seconds", "wall_seconds", "memory_bytes", "max_processes", "file_bytes", "output_bytes"]
)
def test_limits_are_checked(field):
    with pytest.raises(ConfigError, match=f"Limits.{field} = -1"):
        Limits(**{field: -1})
