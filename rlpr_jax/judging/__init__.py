"""A language model as grader: the client that asks an endpoint, and the judge."""
