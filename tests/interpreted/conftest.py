"""These tests run in Triton's interpreter, which must be asked for before triton is imported.

``tests/test_triton_deform_conv2d.py`` starts them in a process of their own; by hand:
``TRITON_INTERPRET=1 pytest tests/interpreted``.
"""

from hdrops import triton

collect_ignore_glob = [] if triton.INTERPRETED else ["*"]
