"""Runs the methods from end to end on a CPU. The code is in benchmarks/demo, which releases do not contain."""
