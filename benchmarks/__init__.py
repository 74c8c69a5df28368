"""What training, evaluation and planning cost here: ours, the field's literal way, and the floor, in one run."""
