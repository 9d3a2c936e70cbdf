"""The same model placed, precise, compiled, faster or split; never what it computes."""
