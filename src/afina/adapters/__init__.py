"""What is learned, and where: the contract, one file a method, attaching, files on disk."""
