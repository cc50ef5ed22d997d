"""One file per command of the CLI: arguments in, work done, table or JSON out."""
