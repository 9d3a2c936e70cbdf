"""Speed, memory and quality, measured."""
