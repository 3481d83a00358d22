"""Tests against what is not ours: a real vLLM, CAMEL, the openai package. Run them by `make test-external`."""
