"""ComfyUI's workflows: API graphs are checked, run and written here, as ComfyUI 0.3.64 does it."""
