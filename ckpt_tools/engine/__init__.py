"""Plan, prove, execute, commit. Leaves (Hugging Face tensors) are the currency: every store, whatever its format and
sharding, is described as the extents of its leaves in files, and a copy gathers a leaf from one store and scatters it
into another."""
