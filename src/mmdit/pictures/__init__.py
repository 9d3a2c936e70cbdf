"""Operations on pictures, masks and latents as plain tensors: read, resize, crop, combine. They need no model."""
