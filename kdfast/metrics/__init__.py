"""What a network costs, and what it knows of another's features."""

from kdfast.metrics.consistency import VarianceReport
from kdfast.metrics.operations import (
    count_operations,
    published_operations,
    published_parameters,
)

__all__ = ["VarianceReport", "count_operations", "published_operations", "published_parameters"]
