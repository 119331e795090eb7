"""Programs that behave: what goes in, what comes out, and how an end is called."""

import concurrent.futures
import logging

import pytest

from cpm_jax.tools import sandbox
from cpm_jax.tools.sandbox import Limits, SandboxError, guarantees, run_python, run_sandboxed

HUMAN_EVAL_TESTS = """
def check(candidate):
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False
check(has_close_elements)
"""


def test_this_host_holds_every_guarantee():
    assert [guarantee for guarantee in guarantees() if not guarantee.held] == []


def test_output_error_and_exit_code():
    result = run_python("import sys; print('out ✓'); print('err', file=sys.stderr); sys.exit(3)")
    assert (result.status, result.returncode, result.stdout, result.stderr) == ("error", 3, "out ✓\n", "err\n")
    assert 0 < result.wall_seconds < 10


def test_stdin_and_files_go_in():
    result = run_python(
        "import sys, pathlib, lib.helper\n"
        "print(sys.stdin.read() + pathlib.Path('a.txt').read_text() + lib.helper.NAME)\n"
        "print(list(pathlib.Path('raw').read_bytes()))\n"
        "pathlib.Path('lib/new').write_text('writable'); pathlib.Path('a.txt').write_text('so is this')\n"
        "pathlib.Path('here').mkdir(); pathlib.Path('here/new').write_text('and this')",
        stdin="Grüße ",
        files={"a.txt": "aus ", "lib/helper.py": "NAME = '北京'", "raw": b"\x00\xff"},
    )
    assert (result.status, result.stdout) == ("ok", "Grüße aus 北京\n[0, 255]\n"), result.stderr


def test_any_program_runs():
    result = run_sandboxed(["sh", "-c", "cat; echo $0 $HOME; exit 7", "x y"], stdin="in ")
    assert (result.status, result.returncode, result.stdout) == ("error", 7, "in x y /tmp/work\n")


def test_a_program_that_is_not_there():
    result = run_sandboxed(["no-such-program"])
    assert (result.status, result.returncode) == ("error", 127)
    assert "no-such-program" in result.stderr


def test_bytes_that_are_no_text():
    result = run_python("import os; os.write(1, bytes(range(256))); os.write(2, b'\\xff')")
    assert result.status == "ok"
    assert result.stdout[:128] == "".join(map(chr, range(128)))
    assert "\ufffd" in result.stdout
    assert result.stderr == "\ufffd"


def test_packages_of_this_python_are_there():
    result = run_python("import json, sqlite3, multiprocessing, ssl, numpy; print(numpy.arange(4).sum())")
    assert (result.status, result.stdout) == ("ok", "6\n"), result.stderr


@pytest.mark.parametrize(("sign", "status"), [("<", "ok"), (">", "error")])
def test_a_human_eval_solution(sign, status):
    solution = (
        "def has_close_elements(numbers, threshold):\n"
        f"    return any(abs(a - b) {sign} threshold for i, a in enumerate(numbers) for b in numbers[:i])\n"
    )
    result = run_python(solution + HUMAN_EVAL_TESTS)
    assert result.status == status
    assert ("AssertionError" in result.stderr) == (status == "error")


def test_eight_at_once():
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: run_python("print(input())", stdin=str(i)), range(16)))
    assert [(result.status, result.stdout) for result in results] == [("ok", f"{i}\n") for i in range(16)]


@pytest.mark.parametrize("name", ["", ".", "/etc/x", "../x", "a/../../x", "a/", "a\0b", "\ud800", "x" * 256])
def test_files_stay_inside(name):
    with pytest.raises(SandboxError, match="inside the working directory"):
        run_python("", files={name: ""})


def test_files_that_cannot_be():
    with pytest.raises(SandboxError, match="is a file, and cannot be its directory"):
        run_python("", files={"a": "", "a/b": ""})
    with pytest.raises(SandboxError, match="the same path"):
        run_python("", files={"a": "", "./a": ""})
    with pytest.raises(SandboxError, match="file_bytes allows 8192"):
        run_python("", files={"a": "x" * 8193}, limits=Limits(file_bytes=8192))
    with pytest.raises(SandboxError, match="at most 200"):
        run_python("", files={str(i): "" for i in range(200)})
    with pytest.raises(SandboxError, match="the program's own"):
        run_python("", files={"program.py": ""})


@pytest.mark.parametrize("files", [{1: ""}, {"a": 5}, {"a": None}])
def test_files_of_wrong_types(files):
    with pytest.raises(SandboxError, match="give names as str, contents as str or bytes"):
        run_python("", files=files)


def test_halves_of_surrogate_pairs_do_no_harm():
    assert run_python("import sys; print(len(sys.stdin.buffer.read()))", stdin="\ud800").stdout == "3\n"
    result = run_python("print('\ud800')")
    assert (result.status, "SyntaxError" in result.stderr) == ("error", True)


@pytest.mark.parametrize("argv", [[], "ls", ["a\0b"], [1], ["echo", "x" * (1 << 20)]])
def test_arguments_that_cannot_be(argv):
    with pytest.raises(SandboxError, match=r"argv|cannot start"):
        run_sandboxed(argv)


@pytest.fixture
def no_walls(monkeypatch):
    """A host without bubblewrap."""
    monkeypatch.setattr(sandbox, "find_walls", lambda: (None, "bubblewrap is not installed"))


def test_without_walls_it_refuses(no_walls):
    with pytest.raises(SandboxError, match="bubblewrap is not installed"):
        run_python("print(1)")
    lost = {guarantee.name for guarantee in guarantees() if not guarantee.held}
    assert {"no network", "nothing survives the program", "number of processes"} <= lost


def test_without_walls_the_flag_runs_it_and_says_what_is_lost(no_walls, caplog):
    with caplog.at_level(logging.WARNING):
        result = run_python("import x; print(x.A, input())", files={"x.py": "A = 1"}, stdin="in", allow_unsafe=True)
    assert (result.status, result.stdout) == ("ok", "1 in\n"), result.stderr
    assert "no network" in caplog.text


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "timeout"),
        ("x = bytearray(1 << 30)", "memory"),
        ("while True: print('x' * 1000)", "output"),
        ("import os; os.kill(os.getpid(), 15)", "killed"),
        ("open('big', 'wb').write(bytes(1 << 20))", "error"),
    ],
)
def test_without_walls_the_limits_of_a_process_hold(no_walls, code, status):
    limits = Limits(wall_seconds=1.0, memory_bytes=1 << 28, file_bytes=1 << 16)
    assert run_python(code, limits=limits, allow_unsafe=True).status == status


def test_the_command_prints_the_guarantees(capsys):
    assert sandbox.main() == 0
    assert capsys.readouterr().out.count("held") == len(guarantees())
