"""Judge rates: intervals, tests, early stopping, many comparisons. Pure functions of numbers; it knows no episode."""
