ACCURACY = "held_out/accuracy"  # the metric by which checkpoints and runs are compared
