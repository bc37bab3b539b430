"""Benchmarks, one file or folder each; every number quoted anywhere comes from one."""
