"""What is known of a prompt before the model reads it: chat template, structure, task."""
