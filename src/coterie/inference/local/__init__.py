"""The in-process engine: scheduler, cache, sampler."""
