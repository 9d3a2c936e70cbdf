"""Every reason for which a test of this suite is skipped. Skip with `pytest.skip(SKIPS[name])`, nowhere with others."""

SKIPS = {
    # tests/mmdit/test_user_weights.py: not part of `make test`, whose machines have no official weights.
    "weights": "give --weights=FOLDER to compare your own checkpoint with diffusers",
    # tests/encoders: other people's data, not in a clone; MMDIT_REQUIRE_OFFICIAL=1 turns this skip into a failure.
    "official tokenizers": "official tokenizer files are not in this clone (../shared/reference/tokenizers)",
    # tests/quant/test_native.py: run it where there is one; `mmdit bench layers` measures the same on official shapes.
    "float8 gpu": "needs a GPU with a float8 matmul (compute capability 8.9 or later)",
    # tests/mmdit/runtime: Triton has wheels for Linux only; there its interpreter runs the kernels on the CPU.
    "triton": "needs Triton, which is for Linux only",
    # tests/mmdit/runtime and tests/mmdit/pipeline: run them where there is one, `make test-gpu`.
    "gpu": "needs a GPU",
    # tests/mmdit/runtime/test_parallel_gpu.py: NCCL.
    "two gpus": "needs two GPUs of one host",
    # tests/mmdit/runtime/test_parallel.py: eight processes take ten seconds.
    "full": "runs in `make test-all` (MMDIT_FULL=1)",
    "stand-in": "treats a CPU as a GPU, which there is here",
    "no gpu": "what a machine without a GPU is told",
    # tests/mmdit/cli/test_console.py and tests/mmdit/test_replacing.py: what only some systems have.
    "full disk": "this system has no /dev/full",
    "bash": "there is no bash",
    "links": "this system has no O_NOFOLLOW",
    # tests/mmdit/pictures/test_edges.py: OpenCV is no dependency of ours.
    "opencv": "needs OpenCV (cv2)",
    # tests/mmdit/training/test_training_gpu.py: the 8-bit AdamW is torchao's.
    "torchao": "needs torchao",
    "memory": "the memory of a process is read from /proc, which only Linux has",
}
