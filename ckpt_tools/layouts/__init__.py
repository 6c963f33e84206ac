"""A layout is data: which native tensor is made of which pieces of which Hugging Face tensors ("leaves").

`algebra` has the index bijections, `rules` the declarative tree that families are written in, and `layout`
resolves a family's rules for one config. Nothing here opens a file.
"""
