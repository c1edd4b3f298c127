"""The operators in plain PyTorch: the oracle of the tests, and the implementation for devices without kernels.

``hdrops.reference.<family>`` has the public functions of that family with the same signature but for ``backend``. They
are differentiable any number of times and in forward mode, and take every floating dtype, float64 included.
"""
