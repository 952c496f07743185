"""Datasets of prompts with images, and what a processor makes of them for a model."""
