"""Training: the storybook world, its tokenizer, and what teaches a model to draw it."""
