"""Language models: text, tokens, pre-training, and what a policy takes over from them (§V-D of the paper)."""
