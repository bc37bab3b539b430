"""Questions asked of the other packages: training runs, comparisons, benchmarks, the demo, records of evidence."""
