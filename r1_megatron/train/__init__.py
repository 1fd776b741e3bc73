"""Learning: the policy as a trainable object, its forward/backward schedule, objectives, the optimizer step."""
