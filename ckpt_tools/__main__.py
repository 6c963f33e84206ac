"""`python -m ckpt_tools` is the `ckpt` command."""

import sys

from ckpt_tools.cli import main
from ckpt_tools.core.ending import end_process

if __name__ == "__main__":
    try:
        main()
    except SystemExit as ended:
        # torchrun starts training so; verbs that need no training half do not import torch.
        if "torch" in sys.modules and isinstance(ended.code, int):
            end_process(ended.code)
        raise
