"""What a network costs, what it knows of another's features, and what of images."""

from kdfast.metrics.consistency import VarianceReport
from kdfast.metrics.knowledge import (
    count_concepts,
    learning_speed,
    measure_knowledge,
    stability,
    survey_thresholds,
)
from kdfast.metrics.operations import (
    count_operations,
    published_operations,
    published_parameters,
)

__all__ = [
    "VarianceReport",
    "count_concepts",
    "count_operations",
    "learning_speed",
    "measure_knowledge",
    "published_operations",
    "published_parameters",
    "stability",
    "survey_thresholds",
]
