"""Pictures, masks and latents as plain tensors: read, resize, cut, combine. No model is needed for any of it."""
