"""One rank of a test: train the given runs one after another in this process."""

import json
import sys

from deepspeed.accelerator import get_accelerator

import model.loss
import train
from launcher.training.resilience.leaving import end_process, leave_together


def main() -> None:
    runs, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    if options.get("claim_fp16"):
        # Any CPU can compute fp16, though slowly, but DeepSpeed refuses it unless it is native.
        get_accelerator().is_fp16_supported = lambda: True
    if "chunk_tokens" in options:
        model.loss.CHUNK_TOKENS = options["chunk_tokens"]
    for arguments in runs:
        code = train.main(arguments)
        assert code == 0, f"{arguments} ended with {code}"
    leave_together()


if __name__ == "__main__":
    main()
    end_process(0)
