"""Layer 5: models and trainers of the Hugging Face ecosystem."""
