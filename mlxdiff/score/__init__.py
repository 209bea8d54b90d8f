"""Judges pictures: how well they match their prompts, and how far two folders of pictures are apart."""
