"""Does it compute the same? compare and verify."""
