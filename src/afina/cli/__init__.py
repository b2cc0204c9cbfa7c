"""The command line: parsing of settings, and printing of results."""
