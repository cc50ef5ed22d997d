"""`python -m dpllm` is the `dpllm` command."""

from dpllm.commands.main import main

if __name__ == "__main__":
    main()
