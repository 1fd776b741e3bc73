"""Several stages as one job: a graph of runs in one YAML, each node made once and found again by what it was made of.

    r1-megatron pipeline run examples/r1_tiny_pipeline.yaml
    r1-megatron pipeline status examples/r1_tiny_pipeline.yaml [--provenance NODE]

Where to read on: ``read.py`` (the file), ``artefacts.py`` (what stages make and take), ``check.py`` (everything wrong
with it, before anything starts), ``store.py`` (keys, folders, provenance), ``driver.py`` (one node after the other),
``status.py``, ``findings.py`` and ``page.py`` (what is said about it).

No torch, no ranks: a node is a process of ``r1-megatron train`` or a job step of Slurm.
"""
