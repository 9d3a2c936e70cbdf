"""Look inside and change: points, capture, patch, attention maps, float8 errors."""
