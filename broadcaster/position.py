"""Positions and gaps, where programs have always found them."""

from broadcaster.core.position import Cause, Gap, Position

__all__ = ["Cause", "Gap", "Position"]
