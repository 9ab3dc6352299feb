"""A numpy array that remembers what it was computed from."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from gradwatch_reference.loans import borrow, frozen

if TYPE_CHECKING:
    from gradwatch_reference.forward import Level
    from gradwatch_reference.primitive import Primitive

Array = NDArray[Any]
Axis = int | tuple[int, ...] | None


class Tensor:
    """An array, the way it was computed, and, once a sweep has passed, its gradient.

    A Tensor is a variable: one of floats has its gradient recorded unless `requires_grad=False`.
    Bare arrays and numbers that meet it in an operation are constants. It copies what it is made
    from, and its array is read-only, so that nothing saved for the backward sweep can change.

    data: anything numpy takes; Python numbers and lists of them become float64.
    Raises TypeError when `requires_grad=True` is asked of an array that is not of floats.
    """

    __slots__ = (
        "args",
        "array",
        "fingerprint",
        "grad",
        "params",
        "parents",
        "primitive",
        "requires_grad",
        "saved",
        "tangents",
    )

    array: Array  # read-only
    fingerprint: bytes | None  # of an array that is on loan; see loans.py
    grad: Array | None
    requires_grad: bool
    primitive: Primitive | None  # None: a leaf
    args: tuple[Any, ...]  # what the primitive was given
    saved: tuple[Any, ...]  # the same, as the bare arrays it saw
    params: dict[str, Any]
    parents: tuple[Tensor, ...]  # those of args whose gradient is recorded
    tangents: Mapping[Level, Tensor]  # forward mode; see forward.py

    def __init__(
        self,
        data: ArrayLike | Tensor,
        *,
        requires_grad: bool | None = None,
        dtype: DTypeLike | None = None,
    ) -> None:
        array = data.array if isinstance(data, Tensor) else np.asarray(data, dtype=dtype)
        if dtype is not None:
            array = array.astype(dtype, copy=False)
        elif array.dtype.kind in "iu" and not isinstance(data, (np.ndarray, np.generic, Tensor)):
            array = array.astype(np.float64)  # a number written without a point
        if requires_grad:
            require_floats(array, "Tensor(..., requires_grad=True)")
        floats = array.dtype.kind == "f"
        _fill(self, frozen(array), floats if requires_grad is None else requires_grad)

    @staticmethod
    def constant(array: Array) -> Tensor:
        """Wrap an array that nobody else will write to, without a copy and without a gradient."""
        tensor = Tensor.__new__(Tensor)
        array.flags.writeable = False
        _fill(tensor, array, False)
        return tensor

    @staticmethod
    def borrowed(array: Array, requires_grad: bool = False) -> Tensor:
        """Wrap an array that others may write to; a sweep that reads it checks that none did."""
        tensor = Tensor.__new__(Tensor)
        array, fingerprint = borrow(array)
        _fill(tensor, array, requires_grad)
        tensor.fingerprint = fingerprint
        return tensor

    def _assign(self, data: ArrayLike) -> None:
        array = frozen(np.asarray(data, dtype=self.array.dtype))
        if array.shape != self.shape:
            raise ValueError(f"a Tensor of shape {self.shape} was assigned data of {array.shape}")
        self.array, self.fingerprint = array, None

    data = property(operator.attrgetter("array"), _assign, doc="The array; assign to replace it.")

    def backward(self, seed: ArrayLike | None = None) -> None:
        """Add the gradient of self to the `grad` of every leaf it was computed from.

        seed: the cotangent of self, of its shape; needed unless self has one element.
        Raises ValueError for a missing seed or one of another shape, and where a saved array was
        replaced; TypeError when there is nothing to differentiate.
        """
        accumulate_gradients(self, seed)

    def zero_grad(self) -> None:
        """Forget the gradient of earlier sweeps, which the next would add to."""
        self.grad = None

    def detach(self) -> Tensor:
        """The same numbers, as a constant."""
        return Tensor.constant(self.array)

    def numpy(self) -> Array:
        """A copy of the array that is yours to write to."""
        return self.array.copy()

    def item(self) -> float:
        return self.array.item()

    # ---- what it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def ndim(self) -> int:
        return self.array.ndim

    @property
    def size(self) -> int:
        return self.array.size

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def op(self) -> str:
        return "" if self.primitive is None else self.primitive.name

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self.array)))

    def __float__(self) -> float:
        return float(self.array)

    def __bool__(self) -> bool:
        return bool(self.array)

    def __repr__(self) -> str:
        origin = f", op={self.op}" if self.op else ""
        return f"Tensor({np.array2string(self.array, separator=', ', prefix='Tensor(')}{origin})"

    # ---- arithmetic

    def __add__(self, other: Operand) -> Tensor:
        return elementwise.add(self, other)

    def __radd__(self, other: Operand) -> Tensor:
        return elementwise.add(other, self)

    def __sub__(self, other: Operand) -> Tensor:
        return elementwise.subtract(self, other)

    def __rsub__(self, other: Operand) -> Tensor:
        return elementwise.subtract(other, self)

    def __mul__(self, other: Operand) -> Tensor:
        return elementwise.multiply(self, other)

    def __rmul__(self, other: Operand) -> Tensor:
        return elementwise.multiply(other, self)

    def __truediv__(self, other: Operand) -> Tensor:
        return elementwise.divide(self, other)

    def __rtruediv__(self, other: Operand) -> Tensor:
        return elementwise.divide(other, self)

    def __pow__(self, other: Operand) -> Tensor:
        return elementwise.power(self, other)

    def __rpow__(self, other: Operand) -> Tensor:
        return elementwise.power(other, self)

    def __matmul__(self, other: Operand) -> Tensor:
        return products.matmul(self, other)

    def __rmatmul__(self, other: Operand) -> Tensor:
        return products.matmul(other, self)

    def __neg__(self) -> Tensor:
        return elementwise.negative(self)

    def __abs__(self) -> Tensor:
        return elementwise.absolute(self)

    def __getitem__(self, index: Any) -> Tensor:
        return shapes.getitem(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        maker = f" made by {self.op}" if self.op else ""
        raise TypeError(
            f"in-place change of a Tensor of shape {self.shape}{maker}: a graph may have saved it; "
            "make a new one, as by where(mask, new, old), or assign to a leaf's .data"
        )

    # ---- comparisons are constant almost everywhere: they leave the graph as bare booleans

    def __lt__(self, other: Operand) -> Array:
        return _compared(operator.lt, self, other)

    def __le__(self, other: Operand) -> Array:
        return _compared(operator.le, self, other)

    def __gt__(self, other: Operand) -> Array:
        return _compared(operator.gt, self, other)

    def __ge__(self, other: Operand) -> Array:
        return _compared(operator.ge, self, other)

    def __eq__(self, other: Operand) -> Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _compared(operator.eq, self, other)

    def __ne__(self, other: Operand) -> Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _compared(operator.ne, self, other)

    __hash__ = object.__hash__  # a node of a graph is itself, whatever its numbers

    # ---- the same functions, written behind the dot

    def exp(self) -> Tensor:
        return elementwise.exp(self)

    def log(self) -> Tensor:
        return elementwise.log(self)

    def sqrt(self) -> Tensor:
        return elementwise.sqrt(self)

    def sin(self) -> Tensor:
        return elementwise.sin(self)

    def cos(self) -> Tensor:
        return elementwise.cos(self)

    def tanh(self) -> Tensor:
        return elementwise.tanh(self)

    def sigmoid(self) -> Tensor:
        return elementwise.sigmoid(self)

    def relu(self) -> Tensor:
        return elementwise.relu(self)

    def erf(self) -> Tensor:
        return elementwise.erf(self)

    def abs(self) -> Tensor:
        return elementwise.absolute(self)

    def clip(self, low: float | None = None, high: float | None = None) -> Tensor:
        return elementwise.clip(self, low=low, high=high)

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return reductions.sum(self, axis, keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return reductions.mean(self, axis, keepdims)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return reductions.max(self, axis, keepdims)

    def min(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return reductions.min(self, axis, keepdims)

    def var(self, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Tensor:
        return reductions.var(self, axis, keepdims, ddof)

    def std(self, axis: Axis = None, keepdims: bool = False, ddof: int = 0) -> Tensor:
        return reductions.std(self, axis, keepdims, ddof)

    def reshape(self, *shape: int | tuple[int, ...]) -> Tensor:
        return shapes.reshape(self, *shape)

    def transpose(self, *axes: int | tuple[int, ...]) -> Tensor:
        return shapes.transpose(self, *axes)

    @property
    def T(self) -> Tensor:  # noqa: N802 (numpy's name)
        return shapes.transpose(self)

    @property
    def mT(self) -> Tensor:  # noqa: N802 (numpy's name)
        return shapes.swapaxes(self, -1, -2)

    # ---- numpy's side

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        if self.requires_grad:
            raise TypeError("a Tensor with a gradient became a bare array: use .numpy() to mean it")
        return np.array(self.array, dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """`np.exp(x)` and `array * x` are the primitives of the same names."""
        if method != "__call__" or options:
            return NotImplemented
        if ufunc is np.matmul:
            return products.matmul(*inputs)
        if ufunc.__name__ in TABLE:
            return TABLE[ufunc.__name__](*inputs)
        if ufunc in PIECEWISE_CONSTANT:
            return ufunc(*(x.array if isinstance(x, Tensor) else x for x in inputs))
        return NotImplemented


Operand = Tensor | Array | float

PIECEWISE_CONSTANT = {
    *(np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal),
    *(np.sign, np.floor, np.ceil, np.rint, np.isnan, np.isfinite, np.isinf),
}


def shape_of(x: Operand) -> tuple[int, ...]:
    return x.shape if isinstance(x, Tensor) else np.shape(x)


def require_floats(array: Array, asker: str) -> None:
    if array.dtype.kind != "f":
        raise TypeError(
            f"{asker}: an array of dtype {array.dtype} and shape {array.shape} has no gradient; "
            "only floats do (use .astype(float))"
        )


def _fill(tensor: Tensor, array: Array, requires_grad: bool) -> None:
    tensor.array = array
    tensor.fingerprint = None
    tensor.grad = None
    tensor.requires_grad = requires_grad
    tensor.primitive = None
    tensor.args = tensor.saved = tensor.parents = ()
    tensor.tangents = NO_TANGENTS


def _compared(comparison: Any, a: Tensor, b: Operand) -> Array:
    mask = np.asarray(comparison(a.array, b.array if isinstance(b, Tensor) else b))
    mask.flags.writeable = False
    return mask


NO_TANGENTS: Mapping[Any, Tensor] = {}

# The operations need Tensor, and Tensor's methods need the operations: these come last.
from gradwatch_reference import elementwise, products, reductions, shapes  # noqa: E402
from gradwatch_reference.primitive import TABLE  # noqa: E402
from gradwatch_reference.reverse import accumulate_gradients  # noqa: E402
