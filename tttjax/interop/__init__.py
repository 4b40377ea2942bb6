"""Import and export of models: Hugging Face transformers and official TTT-E2E checkpoints."""
