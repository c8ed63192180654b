"""Tools to test backends, engines and transports with: import what you need from the submodules.

``models`` builds tiny checkpoints and needs transformers; nothing here is imported by the rest of the package.
"""
