"""Generation inside the training layout and on the training weights: sampler, latent cache, scheduler, engine."""
