"""What is written to disk appears whole or not at all: single files, files that grow, folders. Torch-free."""
