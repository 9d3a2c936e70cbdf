"""ComfyUI workflows: read, check, run and write graphs in API form, as ComfyUI 0.3.64 does."""
