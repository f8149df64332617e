"""How a program reads its command line: flags, their help and completion, one-line errors, and imports that wait for them."""
