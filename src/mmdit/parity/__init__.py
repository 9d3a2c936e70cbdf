"""Compare two pipelines stage by stage (`compare`), and verify a checkpoint against diffusers (`verify`)."""
