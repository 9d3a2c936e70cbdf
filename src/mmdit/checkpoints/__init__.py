"""Files and models: find, read, map, write, quantize, download."""
