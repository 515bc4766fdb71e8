"""ONNX files: graphs that are built, samples that calibrate, trials that prove they run."""
