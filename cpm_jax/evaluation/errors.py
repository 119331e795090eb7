"""The errors of evaluation."""

from cpm_jax.common.config import InputError


class TaskError(InputError):
    """A task that does not exist, or whose data cannot be used; says which and what is accepted."""


class ComparisonError(InputError):
    """Two evaluations that cannot be compared; says where they differ."""


class ResumeError(InputError):
    """An evaluation folder that holds results of another model, of other settings or of other items."""
