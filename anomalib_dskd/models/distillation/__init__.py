"""Base of all models: constructor arguments, training, evaluation, export and checkpoints."""
