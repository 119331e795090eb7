"""The libraries of the extra `sweep`, imported where they are needed."""

import functools

from cpm_jax.common import extras

import_extra = functools.partial(extras.import_extra, extra="sweep")
