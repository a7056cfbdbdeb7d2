"""What ctxdb costs, measured beside hand-written code and the published libraries: ``python -m benchmarks``."""
