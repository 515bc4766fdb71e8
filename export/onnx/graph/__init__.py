"""ONNX graphs of decoders: what a family computes, written with onnxruntime's operators."""
