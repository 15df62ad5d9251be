"""The command line: one command per file, thin: options, one library call, the result on stdout."""
