"""One module an operation: its schema, fake, checks, dispatch and autograd."""
