"""`python -m dpllm` is the `dpllm` command."""

from dpllm.cli import main

if __name__ == "__main__":
    main()
