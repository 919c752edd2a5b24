"""The exported language model under onnxruntime."""
