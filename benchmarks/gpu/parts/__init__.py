"""One module a part, each with `run(report)`; `benchmarks.gpu.runner.PARTS` has their order."""
