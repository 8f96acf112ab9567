"""The errors that programs may want to catch, where they have always been found."""

from broadcaster.core.errors import *  # noqa: F403
