"""Fine-tuning: the objective, the step, adapters, and the loop around them."""
