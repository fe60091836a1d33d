"""The command line: arguments in, results to a renderer, an exit status out."""
