"""Paddock: LoRA fine-tuning and serving of LLaMA-family models on Ray."""

__version__ = "0.1.0"
