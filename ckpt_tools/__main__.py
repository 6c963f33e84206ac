"""`python -m ckpt_tools` is the `ckpt` command."""

from ckpt_tools.cli import main

if __name__ == "__main__":
    main()
