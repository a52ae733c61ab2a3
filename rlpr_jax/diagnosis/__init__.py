"""What a reward sees: whether it tells right from wrong, whether the reasoning matters, and what it likes.

rows       responses with their rewards: a run's own, or sampled anew; their grades
findings   AUCs against the grades, accuracy, words and lengths that go with a reward
reasoning  references and answers scored again with other reasoning; mutual information; token by token
study      all of it, as diagnosis.json has it
statistics, texts                          pure functions, on which these stand
"""
