"""Training: LoRAs for any model; the storybook world, its tokenizer, and the code that trains a model to draw it."""
