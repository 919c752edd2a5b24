import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as edge_agent has it, wherever onnxruntime is loaded first
