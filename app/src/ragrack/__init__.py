"""A LlamaIndex RAG service that answers from read-only index snapshots."""

import os

# Since 1.29 onnxruntime gives the machine an id, kept in the home directory, and reports to its maker over the network.
# It looks for this variable once, when it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
