"""The science: data, model, training, merging and rollouts. Never imports ray, never imports upwards."""
