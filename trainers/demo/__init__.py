"""The pack's methods from end to end on a CPU; the code is in benchmarks/demo, which a checkout has and a release lacks."""
