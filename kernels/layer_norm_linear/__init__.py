"""Layer norm and the linear layers that read it, in one pass over the pair representation."""
