"""Every reason for which a test of this suite is skipped. Skip with `pytest.skip(SKIPS[name])`, nowhere with others."""

SKIPS = {
    # tests/mmdit/test_user_weights.py: not part of `make test`, whose machines have no official weights.
    "weights": "give --weights=FOLDER to compare your own checkpoint with diffusers",
    # tests/encoders: other people's data, not in a clone; MMDIT_REQUIRE_OFFICIAL=1 turns this skip into a failure.
    "official tokenizers": "official tokenizer files are not in this clone (../shared/reference/tokenizers)",
    "memory": "the memory of a process is read from /proc, which only Linux has",
}
