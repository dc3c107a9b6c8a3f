# SPDX-License-Identifier: Apache-2.0
"""What an engine is worth: its metrics through the Trainer, and its latency in a process of its own.

Loads nothing by itself, so that the process that times an ONNX file carries no torch.
"""
