"""From episodes to gradients: batches, losses, the learner."""
