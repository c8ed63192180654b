"""weightcast inside stock SGLang: calls on each scheduler's thread and HTTP routes, through SGLang's own plug-in group and hooks.

Imported only inside SGLang's processes. No file of SGLang is changed. ``plugin`` says where weightcast comes in; what is called of a
scheduler is in ``scheduler``, and of the process that serves requests in ``served``.
"""
