"""`python -m experiments.sweep_child PARENT verb …`: the runner as a process that does not outlive its parent.

Set here and not by the parent between fork and exec, which is not safe in a process with threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Runs the verb; on Linux the system kills this process when its parent dies, even by SIGKILL."""
    parent, *argv = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it died before that
            return 1
    from experiments import run

    return run.main(argv)


if __name__ == "__main__":
    sys.exit(main())
