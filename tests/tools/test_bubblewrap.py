"""The walls themselves: what they keep of the caller, for every kind of caller, and what is said where they fail."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpm_jax.tools import bubblewrap, sandbox
from cpm_jax.tools.bubblewrap import Walls, find_walls, run_behind_walls
from cpm_jax.tools.limits import Limits, SandboxError
from cpm_jax.tools.sandbox import guarantees, run_python, run_sandboxed

# Run as a user who may not even see this Python: programs of the system alone are bound.
AS_ORDINARY_USER = """
import json, os, sys
from cpm_jax.tools.bubblewrap import Walls, run_behind_walls
from cpm_jax.tools.limits import Limits
if os.geteuid() == 0:
    os.setgroups([]), os.setresgid(65534, 65534, 65534), os.setresuid(65534, 65534, 65534)
sys.prefix = sys.base_prefix = sys.exec_prefix = sys.base_exec_prefix = "/usr"
said = []
limits = Limits(max_processes=8, file_bytes=4 << 20, cpu_seconds=0.3, wall_seconds=20.0)
for program in json.load(sys.stdin):
    outcome, code = run_behind_walls(
        Walls("user namespace"), ["sh", "-c", program], stdin=b"", files={}, limits=limits
    )
    said.append([outcome.stopped, code, outcome.stdout.decode(), outcome.stderr.decode()])
print(json.dumps(said))
"""


def test_an_ordinary_user_has_the_same_walls():
    programs = [
        "id -u; pwd; echo kept > file; cat file",
        "cat /etc/shadow",
        "echo x > /usr/x",
        "echo x > /x",
        "ls /proc/1/",
        "dd if=/dev/zero of=/proc/1/mem count=1",
        "echo x > /proc/sys/kernel/core_pattern",
        "unshare -Ur true",
        "mount -t tmpfs none /tmp",
        f"kill -9 {os.getpid()}",
        "dd if=/dev/zero of=/tmp/big bs=1M count=5",
        "for i in 1 2 3 4 5 6 7 8 9; do sleep 60 & echo $i; done",
        "while :; do :; done",
        "grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status",
    ]
    child = subprocess.run(
        [sys.executable, "-c", AS_ORDINARY_USER],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(bubblewrap.__file__).parents[2],
    )
    assert child.returncode == 0, child.stderr
    works, *refused, forks, spins, status = json.loads(child.stdout)
    assert works == [None, 0, "65534\n/tmp/work\nkept\n", ""]
    for program, (_, code, stdout, _) in zip(programs[1:-3], refused, strict=True):
        assert stdout == "", program
        assert code != 0 or program == "ls /proc/1/"
    assert forks[2].split() == list("1234567")
    assert spins[0] == "timeout"
    assert status[2].split() == ["CapEff:", "0" * 16, "NoNewPrivs:", "1", "Seccomp:", "2"]


def test_nothing_of_the_caller_is_inherited(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("SECRET", "of the caller")
    with open(tmp_path / "open", "w") as file:
        os.set_inheritable(file.fileno(), True)
        result = run_python(
            "import os\n"
            "left = [fd for fd in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{fd}')]\n"
            "print(sorted(os.environ), left)\n"
            "print(os.getsid(0) == os.getpid() or os.getsid(0) == 1, os.getgroups())\n"
            "print(chr(27) + ']0;title' + chr(7))"
        )
    variables = sorted({*bubblewrap.environment(""), "PWD"})
    assert result.stdout == f"{variables} ['0', '1', '2']\nTrue []\n\x1b]0;title\x07\n", result
    assert capfd.readouterr() == ("", "")


def test_a_run_leaves_no_descriptor_and_no_child():
    run_python("")
    before = os.listdir("/proc/self/fd")
    for program in ("pass", "import time; time.sleep(60)", "while True: print()"):
        run_python(program, files={"a": "b"}, limits=Limits(wall_seconds=0.3))
    with pytest.raises(SandboxError):
        run_sandboxed(["echo", "x" * (1 << 20)])
    assert os.listdir("/proc/self/fd") == before
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    assert [pid for pid in children.read_text().split() if "bwrap" in Path(f"/proc/{pid}/comm").read_text()] == []


def test_it_dies_with_its_caller(host):
    code = "import sys; from cpm_jax.tools.sandbox import run_sandboxed; run_sandboxed(sys.argv[1:])"
    caller = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", "import time; time.sleep(60)", host.token],
        cwd=Path(bubblewrap.__file__).parents[2],
    )

    def sandboxed() -> list[str]:
        return [pid for pid in host.processes() if pid != str(caller.pid)]

    try:
        wait_until(lambda: len(sandboxed()) >= 3)  # bubblewrap twice, and the program
        caller.send_signal(signal.SIGKILL)
        caller.wait()
        wait_until(lambda: sandboxed() == [])
    finally:
        caller.kill()
        caller.wait()


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_too_many_processes_are_killed_where_the_kernel_does_not_count_them():
    walls, _ = find_walls()
    outcome, _ = run_behind_walls(
        Walls(walls.kind, count_processes=False),
        ["sh", "-c", "for i in $(seq 100); do sleep 60 & done; wait"],
        stdin=b"",
        files={},
        limits=Limits(max_processes=10),
    )
    assert outcome.stopped == "killed"


@pytest.fixture
def fresh_walls(monkeypatch):
    """Has the walls tried anew in the test, and again after it."""
    monkeypatch.setattr(bubblewrap, "find_walls", find_walls.__wrapped__)
    monkeypatch.setattr(sandbox, "find_walls", find_walls.__wrapped__)


def test_a_host_without_bubblewrap(fresh_walls, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="bubblewrap is not installed"):
        run_python("")


def test_a_host_that_refuses_namespaces(fresh_walls, monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SandboxError, match="No permissions to create a new namespace"):
        run_python("")
    assert {guarantee.name for guarantee in guarantees() if guarantee.held} == {
        "memory of each process",
        "CPU time of each process",
        "size of each file",
        "time by the clock",
        "output",
    }


def test_a_machine_whose_system_calls_are_unknown(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert [guarantee.name for guarantee in guarantees() if not guarantee.held] == ["no dangerous system calls"]
    assert run_python("print(1)").stdout == "1\n"
