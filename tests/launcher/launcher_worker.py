"""One rank of a test: trains each run that it is given, one after another, in this process."""

import json
import sys

from deepspeed.accelerator import get_accelerator

import model.loss
import train
from launcher.training.resilience.leaving import end_process, leave_together


def main() -> None:
    runs, options = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    if options.get("claim_fp16"):
        # CPUs compute fp16, only slowly; DeepSpeed refuses them where it is not native.
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
