"""Training modes: who hears whom, and how the reward pool is divided."""
