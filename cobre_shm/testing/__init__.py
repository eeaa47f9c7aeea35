"""Support for testing backends and the programs that use them."""
