"""HumanEval (Chen et al. 2021): functions that a model completes, run against their tests in the sandbox."""

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from cpm_jax.tools.sandbox import Limits, run_python

LIMITS = Limits(cpu_seconds=10.0, wall_seconds=15.0)
# Sampling of `humaneval_<n>`, as in lm-eval's humaneval_64.
TEMPERATURE, TOP_P = 0.2, 0.95
_KS = (1, 10, 100)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples passes: the unbiased estimate 1 - C(n - c, k) / C(n, k) (Chen et al., eq. 1).

    Args:
        samples: n, at least k.
        passed: c, how many of them passed.
        k: samples that one may submit.
    """
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def ks(samples: int) -> tuple[int, ...]:
    """The k that pass@k is given for: 1, 10, 100 as far as there are samples, and the number of samples."""
    return tuple(sorted({k for k in (*_KS, samples) if k <= samples}))


def passes(program: str, test: str, entry_point: str, *, allow_unsafe: bool = False) -> bool:
    """Whether a program passes the tests of its problem, within `LIMITS`, in the sandbox.

    A program that ends the process before the tests have run does not pass, whatever its exit code: the line behind
    them prints a word that is new each time.

    Args:
        program: defines `entry_point`; untrusted.
        test: defines `check`.
        entry_point: what is checked.
        allow_unsafe: as in `tools.sandbox.run_python`.

    Raises:
        SandboxError: this host cannot build a sandbox.
    """
    word = secrets.token_hex(16)
    code = f"{program}\n{test}\ncheck({entry_point})\nprint()\nprint({word!r})\n"
    result = run_python(code, limits=LIMITS, allow_unsafe=allow_unsafe)
    return result.status == "ok" and result.stdout.rstrip("\n").rpartition("\n")[2] == word


def check_sandbox(*, allow_unsafe: bool) -> None:
    """Sees to it that programs can be run before a model is asked to write them.

    Raises:
        SandboxError: this host cannot build a sandbox.
    """
    run_python("", limits=LIMITS, allow_unsafe=allow_unsafe)


def process_results(doc: Mapping[str, Any], results: Sequence[list[str]], *, allow_unsafe: bool) -> dict[str, float]:
    """lm-eval's hook: pass@k of one problem from its programs."""
    (programs,) = results
    passed = sum(passes(code, doc["test"], doc["entry_point"], allow_unsafe=allow_unsafe) for code in programs)
    return {f"pass@{k}": pass_at_k(len(programs), passed, k) for k in ks(len(programs))}


def complete(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]], *, fenced: bool) -> list[list[str]]:
    """lm-eval's filter: programs from completions; of an answer in Markdown what comes before the closing fence."""
    return [
        [doc["prompt"] + (text.partition("```")[0] if fenced else text) for text in texts]
        for texts, doc in zip(responses, docs, strict=True)
    ]
