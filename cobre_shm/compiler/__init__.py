"""Makes images of machine code from the kernels. Imported by name, where an image is missing."""
