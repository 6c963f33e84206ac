"""File formats: safetensors, Hugging Face repositories, DCP and sharded safetensors. Reads headers, no tensor data."""
