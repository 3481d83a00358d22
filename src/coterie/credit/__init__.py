"""Credit schemes: rewards to advantages, one scheme per file."""
