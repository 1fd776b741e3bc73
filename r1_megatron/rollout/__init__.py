"""Generation inside the training layout and on the training weights: sampler, cache, scheduler, engine."""
