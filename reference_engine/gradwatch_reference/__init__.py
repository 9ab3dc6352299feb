"""An automatic differentiation engine written from scratch, to be read and to be trusted.

`Value` is reverse mode over Python floats: the idea, on one page.
"""

from gradwatch_reference.value import Value, Vector, dot

__all__ = ["Value", "Vector", "dot"]
