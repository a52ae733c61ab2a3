"""What a reward sees: whether it tells right from wrong, whether the reasoning matters, and what it likes.

rollouts of a run, or fresh ones -> rows -> findings (AUCs, correlations) -> diagnosis.json
                                        \\-> reasoning (scored again with other reasoning), mutual information
"""
