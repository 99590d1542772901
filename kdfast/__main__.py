"""`python -m kdfast` says what is installed here."""

from kdfast.about import report

print(report())
