"""FX passes: plain functions on a GraphModule, usable with or without the backend."""
