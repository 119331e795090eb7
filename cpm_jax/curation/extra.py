"""The libraries of the extra `curate`, imported where they are needed."""

import functools

from cpm_jax.common import extras
from cpm_jax.data.errors import DataError

import_extra = functools.partial(extras.import_extra, extra="curate", error=DataError)
