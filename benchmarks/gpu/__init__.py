"""What a GPU does with the programs of a training step: right numbers, speed, memory. One command, minutes.

    PYTHONPATH=. python -m benchmarks.gpu --out=DIR [--minutes=8] [--only=decode,update] [--cache=DIR] [--rehearse]

`runner` gives each of `parts` a process and a share of the time; a part tells what it finds line by line (`report`),
and `table` makes one document of it all. docs/gpu.md says how to read it.
"""
