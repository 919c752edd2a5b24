import os

# onnxruntime 1.29 and later report to their maker over the network, and keep a number of the device in ~/.cache, unless
# this is set before they are loaded. What an agent does is nobody's business; who wants to tell sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
