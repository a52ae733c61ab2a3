"""The cost of a config's step on devices that are only described: memory, operations, collectives, time.

    config, topology -> programs at the config's shapes -> the compiler's figures -> fit, rooflines -> a table

`hardware` knows chips, `programs` what a step runs, `compiler` asks the real compilers, `estimate` does the sums.
"""
