"""Task prompts, Chinese and English, as template files."""
