"""What a network costs."""

from kdfast.metrics.operations import (
    count_operations,
    published_operations,
    published_parameters,
)

__all__ = ["count_operations", "published_operations", "published_parameters"]
