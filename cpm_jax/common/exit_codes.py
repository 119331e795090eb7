"""Exit codes by which a supervisor knows what to do next; 75 and 76 mean: run the same command again."""

OK = 0
FAILED = 1
BAD_CONFIG = 2
BAD_INPUT = 3  # data or a checkpoint cannot be read, or does not fit
PREEMPTED = 75  # SIGTERM or SIGINT: state was saved
STUCK = 76  # the watchdog saw no step in time; stacks are in the log
NON_FINITE = 77  # too many non-finite steps in a row
