"""The worker's side: a model that can take weights, and rounds of them."""
