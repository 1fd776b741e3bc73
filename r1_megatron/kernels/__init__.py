"""Arithmetic that is worth an operator of its own, each behind a plain PyTorch form.

What lives here is pure tensor arithmetic with a written contract (shapes, dtypes, formula) and, where it matters, its
analytic gradient. The plain form runs on every machine and in float64, so it is also the oracle of the tests; a
compiled operator attaches under the same function and must agree with it. Nothing here knows a model, a schedule or a
configuration; the only communication is what an operator's formula needs, over the process group it is given.

``vocab_parallel.py``: log-probability and entropy of a token from vocabulary-sharded logits.
"""
