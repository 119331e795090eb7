"""Exit codes by which a supervisor knows what to do next; 75, 76 and 78 mean: run the same command again."""

OK = 0
FAILED = 1
BAD_CONFIG = 2
BAD_INPUT = 3  # data or a checkpoint cannot be read, or does not fit
PREEMPTED = 75  # SIGTERM or SIGINT: state was saved
STUCK = 76  # the watchdog saw no step in time; stacks are in the log
NON_FINITE = 77  # too many non-finite steps in a row
PROCESS_LOST = 78  # another process of the run died, or never came


class Stop(Exception):
    """Ends the process with an exit code, after all was saved that can be; the message is meant for the user.

    Attributes:
        code: one of the codes above.
    """

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code
