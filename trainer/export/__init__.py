"""The export stage: a checkpoint becomes a Hugging Face folder that was loaded again and compared with the training."""
