"""A bundle as a model repository of Triton Inference Server.

pbtxt       messages in protobuf's text format
configs     what Triton is told of each model
repository  the folder
model       copied into it: what Triton's Python backend runs
"""
