"""Names, dtypes, errors, safe paths and the description of a checkpoint. Imports nothing but the standard library."""
