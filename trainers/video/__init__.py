"""Video files: decoding, sampling in time, sizes and tone mapping."""
