"""What the arithmetic instructions of PTX do, for `ptx_cpu`."""

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


def from_bf16(raw):
    """uint16 bits of bf16 numbers -> float32."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def to_bf16(value):
    """float32 -> uint16 bits of the nearest bf16 numbers, ties to even."""
    raw = np.ascontiguousarray(value).view(np.uint32)
    nearest = (raw + 0x7FFF + (raw >> 16 & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, nearest).astype(np.uint16)


class Arithmetic:
    """The part of a thread block that computes: needs `regs`, `n`, `bits`, `read` and `write`."""

    def alu(self, op, args):
        parts = op.split(".")
        name, kind = parts[0], parts[-1]
        dst, rest = args[0], args[1:]
        if name == "mov":
            return self.move(kind, dst, rest[0])
        if name == "cvt":
            return self.convert(parts, dst, rest)
        if name == "setp":
            x, y = (self.read(o, kind) for o in rest[:2])
            compare = {
                "lt": np.less,
                "le": np.less_equal,
                "gt": np.greater,
                "ge": np.greater_equal,
                "eq": np.equal,
                "ne": np.not_equal,
                "neu": np.not_equal,
                "equ": np.equal,
                "lo": np.less,
                "hs": np.greater_equal,
                "ltu": np.less,
                "gtu": np.greater,
                "leu": np.less_equal,
                "geu": np.greater_equal,
            }[parts[1]]
            return self.write(dst, compare(x, y))
        if name == "selp":
            return self.write(
                dst,
                np.where(self.regs[rest[2]], self.read(rest[0], kind), self.read(rest[1], kind)),
            )
        if kind == "pred":
            x = [self.regs[o] if o in self.regs else np.full(self.n, bool(int(o, 0))) for o in rest]
            return self.write(
                dst,
                {
                    "and": np.logical_and,
                    "or": np.logical_or,
                    "xor": np.logical_xor,
                    "not": lambda v: ~v,
                }[name](*x),
            )
        if name in ("shl", "shr", "bfe", "bfi", "prmt", "lop3"):
            return self.write(dst, self.bit_field(name, kind, rest))
        if kind == "f16x2":  # both halves of a word at once
            x = [self.bits(o, 32).view(np.float16) for o in rest]
            pair = {"mul": np.multiply, "add": np.add, "sub": np.subtract}[name](*x)
            return self.write(dst, pair.view(np.uint32))
        letter, width = kind[0], int(kind[1:])
        x = [self.read(o, kind) for o in rest]
        if name in ("mul", "mad") and letter in "us":
            wide = x[0].astype(object if width == 64 else np.int64 if letter == "s" else np.uint64)
            product = wide * x[1].astype(wide.dtype)
            if "hi" in parts:
                product = product >> np.array(width, wide.dtype) if width < 64 else product >> 64
            out = width * 2 if "wide" in parts else width
            product = product.astype(np.uint64 if letter == "u" else np.int64).astype(UNSIGNED[out])
            if name == "mad":
                product = product + self.bits(rest[2], out)
            return self.write(dst, product)
        simple = {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
            "min": np.fmin,
            "max": np.fmax,
            "neg": np.negative,
            "not": np.invert,
            "abs": np.abs,
            "fma": lambda p, q, r: (p.astype(np.float64) * q + r).astype(p.dtype),
            "ex2": np.exp2,
            "lg2": np.log2,
            "rcp": np.reciprocal,
            "sqrt": np.sqrt,
            "rsqrt": lambda v: 1 / np.sqrt(v),
            "div": np.divide if letter == "f" else np.floor_divide,
        }
        if name not in simple:
            raise NotImplementedError(op)
        return self.write(dst, simple[name](*x))

    def move(self, kind, dst, src):
        width = int(kind[1:]) if kind != "pred" else 0
        if kind == "pred":
            self.write(
                dst, self.regs[src] if src in self.regs else np.full(self.n, bool(int(src, 0)))
            )
        elif isinstance(dst, list):
            part = width // len(dst)
            pieces = (
                np.ascontiguousarray(self.bits(src, width)).view(UNSIGNED[part]).reshape(self.n, -1)
            )
            for i, register in enumerate(dst):
                self.write(register, pieces[:, i].copy())
        elif isinstance(src, list):
            part = width // len(src)
            self.write(
                dst, np.stack([self.bits(s, part) for s in src], 1).view(UNSIGNED[width])[:, 0]
            )
        else:
            self.write(dst, self.bits(src, width))

    def convert(self, parts, dst, rest):
        to, source = parts[-2], parts[-1]
        if to in ("f16x2", "bf16x2"):  # the first operand is the high half
            pair = np.stack([self.read(rest[1], source), self.read(rest[0], source)], 1)
            pair = to_bf16(pair) if to == "bf16x2" else pair.astype(np.float16)
            return self.write(dst, np.ascontiguousarray(pair).view(np.uint32)[:, 0])
        value = self.read(rest[0], source)
        if to == "bf16":
            return self.write(dst, to_bf16(value))
        types = {"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOAT}[to[0]]
        if source[0] == "f" and to[0] in "us":
            value = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[parts[1]](
                value
            )
        return self.write(dst, value.astype(types[int(to[1:])]))

    def bit_field(self, name, kind, rest):
        letter, width = kind[0], int(kind[1:])
        x = self.read(rest[0], kind)
        if name in ("shl", "shr"):
            amount = self.bits(rest[1], 32).astype(np.int64)
            shifted = (np.left_shift if name == "shl" else np.right_shift)(
                x, np.minimum(amount, width - 1).astype(x.dtype)
            )
            return np.where(
                amount < width, shifted, x >> (width - 1) if letter == "s" and name == "shr" else 0
            ).astype(x.dtype)
        if name == "bfe":
            start, length = (self.bits(o, 32).astype(np.int64) for o in rest[1:])
            field = (x.astype(np.int64) >> start) & ((1 << length) - 1)
            if letter == "s":
                field = np.where((field >> (length - 1)) & 1, field - (1 << length), field)
            return field.astype(x.dtype)
        if name == "bfi":
            y, (start, length) = (
                self.bits(rest[1], width),
                (self.bits(o, 32).astype(np.uint64) for o in rest[2:]),
            )
            mask = ((np.uint64(1) << length) - np.uint64(1)) << start
            return ((y.astype(np.uint64) & ~mask) | ((x.astype(np.uint64) << start) & mask)).astype(
                x.dtype
            )
        if name == "prmt":
            pool = np.stack([self.bits(o, 32) for o in rest[:2]], 1).view(np.uint8)
            chooser = self.bits(rest[2], 32)[:, None] >> (np.arange(4, dtype=np.uint32) * 4)
            picked = np.take_along_axis(pool, (chooser & 7).astype(np.int64), 1)
            return np.ascontiguousarray(
                np.where(chooser & 8, np.where(picked >> 7, 255, 0), picked).astype(np.uint8)
            ).view(np.uint32)[:, 0]
        table, (p, q, r) = int(rest[3], 0), (self.bits(o, width) for o in rest[:3])
        terms = [
            (p if i & 4 else ~p) & (q if i & 2 else ~q) & (r if i & 1 else ~r)
            for i in range(8)
            if table >> i & 1
        ]
        return np.bitwise_or.reduce(terms) if terms else np.zeros_like(p)
