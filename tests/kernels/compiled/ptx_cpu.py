"""Runs a compiled kernel's PTX on the CPU with NumPy, one thread block at a time in lockstep.

It checks the numbers of machine code whose GPU is absent: a T4's `mma.sync.m16n8k8`, and from
sm_80 on `m16n8k16`, bf16, and copies that run until they are waited for. The layouts of fragments
are those of the PTX ISA manual, "Matrix fragments".

Limits: branches must be uniform within a block; only instructions that Triton emits for kernels
like ours are known, any other raises NotImplementedError.
"""

import re
import struct

import numpy as np
import torch
from compiled.ptx_alu import FLOAT, SIGNED, UNSIGNED, Arithmetic, from_bf16

BASE = 1 << 20
SPECIAL = (
    "%tid.x",
    "%ctaid.x",
    "%ctaid.y",
    "%ctaid.z",
    "%nctaid.x",
    "%nctaid.y",
    "%nctaid.z",
    "%ntid.x",
    "%laneid",
)


def parse(ptx):
    """Parameters [(kind, name)], threads, code [(predicate, opcode, operands)], labels."""
    entry = ptx[ptx.index(".visible .entry") :]
    params = re.findall(r"\.param \.(\w+)(?: \.ptr[^,\n)]*)? (\w+)", entry[: entry.index(")")])
    threads = int(re.search(r"\.reqntid (\d+)|\.maxntid (\d+)", entry)[0].split()[-1])
    code, labels = [], {}
    for line in entry[entry.index("{") + 1 :].splitlines():
        line = re.sub(r"//.*", "", line).strip()
        if not line or (line.startswith((".", "{", "}")) and not line.startswith("{ ")):
            continue
        label = re.match(r"(\$\w+):$", line)
        if label:
            labels[label[1]] = len(code)
            continue
        for statement in filter(None, (s.strip() for s in line.split(";"))):
            match = re.match(r"(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement)
            code.append((match[1], match[2], operands(match[3])))
    return params, threads, code, labels


def operands(text):
    """Split at commas outside braces and brackets; a braced list becomes a list."""
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)
    return [re.findall(r"[^,{}\s]+", p) if p.startswith("{") else p.strip() for p in parts]


class Block(Arithmetic):
    """One thread block: registers as [threads] arrays of raw bits, memory as bytes."""

    def __init__(self, threads, ctaid, nctaid, heap, shared_bytes, params):
        lane = np.arange(threads, dtype=np.uint32)
        values = (
            lane,
            *(np.full(threads, v, np.uint32) for v in (*ctaid, *nctaid, threads)),
            lane % 32,
        )
        self.regs = dict(zip(SPECIAL, values, strict=True))
        self.heap, self.params, self.n = heap, params, threads
        self.shared = np.full(max(shared_bytes, 16) + 64, 0xFF, np.uint8)  # NaN until written
        self.active = np.ones(threads, bool)
        self.copies = [[]]  # groups of copies that may still run; the last one is open

    def bits(self, operand, width):
        if operand in self.regs:
            return (
                self.regs[operand].astype(UNSIGNED[width])
                if self.regs[operand].dtype != bool
                else self.regs[operand]
            )
        if operand.startswith("global_smem"):
            value = 0
        elif re.match(r"0([fF][0-9a-fA-F]{8}|[dD][0-9a-fA-F]{16})$", operand):
            value = int(operand[2:], 16)
        else:
            value = int(operand.rstrip("U"), 0)
        return np.full(self.n, value & ((1 << width) - 1), UNSIGNED[width])

    def read(self, operand, kind):
        if kind == "bf16":
            return from_bf16(self.bits(operand, 16))
        letter, width = kind[0], int(kind[1:])
        raw = self.bits(operand, width)
        return raw if letter in "ub" else raw.view((SIGNED if letter == "s" else FLOAT)[width])

    def write(self, register, value):
        value = np.broadcast_to(value, (self.n,))
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(UNSIGNED[value.dtype.itemsize * 8])
        if register == "_":
            return
        old = self.regs.get(register)
        if old is None or self.active.all():
            self.regs[register] = value.copy()
        else:
            self.regs[register] = np.where(self.active, value, old.astype(value.dtype))

    def address(self, operand, width):
        match = re.match(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        return self.bits(match[1], width).astype(np.int64) + int(match[2] or 0)

    def space(self, op):
        return (self.shared, 0, 32) if ".shared" in op else (self.heap, BASE, 64)

    def load(self, op, dst, src):
        memory, base, width = self.space(op)
        size, index = int(op[-2:].lstrip("bufs")) // 8, self.address(src, width) - base
        for i, register in enumerate(dst if isinstance(dst, list) else [dst]):
            where = np.where(self.active, index + i * size, 0)[:, None] + np.arange(size)
            self.write(register, np.ascontiguousarray(memory[where]).view(UNSIGNED[size * 8])[:, 0])

    def store(self, op, dst, src):
        memory, base, width = self.space(op)
        size, index = int(op[-2:].lstrip("bufs")) // 8, self.address(dst, width) - base
        for i, register in enumerate(src if isinstance(src, list) else [src]):
            raw = (
                np.ascontiguousarray(self.bits(register, size * 8))
                .view(np.uint8)
                .reshape(self.n, size)
            )
            memory[(index + i * size)[self.active, None] + np.arange(size)] = raw[self.active]

    def copy(self, op, dst=None, src=None, size=None, filled=None):
        """cp.async: what it copies arrives at the latest moment, when a wait demands it."""
        if "commit_group" in op:
            self.copies.append([])
        elif "wait_group" in op:
            while len(self.copies) > int(dst) + 1:
                for where, data in self.copies.pop(0):
                    self.shared[where] = data
        else:
            size, to, start = int(size, 0), self.address(dst, 32), self.address(src, 64) - BASE
            real = self.bits(filled or str(size), 32).astype(np.int64)  # zeros fill the rest
            at = np.arange(size)
            if ((to | np.where(real > 0, start, 0)) % size)[self.active].any():
                raise ValueError(f"misaligned address: {op}")
            inside = at < real[:, None]
            data = np.where(inside, self.heap[np.where(inside, start[:, None] + at, 0)], 0)
            self.copies[-1].append(((to[:, None] + at)[self.active], data[self.active]))

    def ldmatrix(self, op, dst, src):
        index, half = self.address(src, 32).reshape(-1, 32), self.shared[:-64].view(np.uint16)
        lane = np.arange(32)
        for j, register in enumerate(dst):
            rows = index[:, 8 * j : 8 * j + 8] // 2  # [warps, 8]
            tile = half[rows[:, :, None] + np.arange(8)]  # [warps, 8, 8]
            if ".trans" in op:
                tile = tile.transpose(0, 2, 1)
            pair = np.stack([tile[:, lane // 4, lane % 4 * 2 + i] for i in (0, 1)], -1)
            self.write(register, np.ascontiguousarray(pair).view(np.uint32).reshape(-1))

    def mma(self, op, d, a, b, c):
        k = 16 if "k16" in op else 8
        brain = ".f32.bf16.bf16.f32" in op
        if not (brain or ".f32.f16.f16.f32" in op):
            raise NotImplementedError(op)
        lane = np.arange(32)
        g, t, warps = lane // 4, lane % 4, self.n // 32

        def halves(reg):
            raw = self.bits(reg, 32).view(np.uint16).reshape(warps, 32, 2)
            return from_bf16(raw) if brain else raw.view(np.float16).astype(np.float32)

        A, B, C = (np.zeros((warps, *s), np.float32) for s in ((16, k), (k, 8), (16, 8)))
        for j, reg in enumerate(a):
            for i in (0, 1):
                A[:, g + 8 * (j % 2), t * 2 + i + 8 * (j // 2)] = halves(reg)[:, :, i]
        for j, reg in enumerate(b if isinstance(b, list) else [b]):
            for i in (0, 1):
                B[:, t * 2 + i + 8 * j, g] = halves(reg)[:, :, i]
        for j, reg in enumerate(c):
            C[:, g + 8 * (j // 2), t * 2 + j % 2] = self.read(reg, "f32").reshape(warps, 32)
        D = C + A @ B
        for j, reg in enumerate(d):
            self.write(reg, D[:, g + 8 * (j // 2), t * 2 + j % 2].reshape(-1))

    def shuffle(self, op, dst, src, arg, _clamp, _mask):
        register = dst.split("|")[0]
        lane, delta = np.arange(self.n), self.bits(arg, 32).astype(np.int64)
        mode = op.split(".")[2]
        source = {
            "bfly": lane ^ delta,
            "idx": lane // 32 * 32 + delta,
            "down": lane + delta,
            "up": lane - delta,
        }[mode]
        self.write(register, self.bits(src, 32)[np.where(source // 32 == lane // 32, source, lane)])

    def execute(self, code, labels):
        at = steps = 0
        while at < len(code):
            predicate, op, args = code[at]
            at, steps = at + 1, steps + 1
            self.active = np.ones(self.n, bool)
            if predicate:
                value = self.regs[predicate.lstrip("!")]
                self.active = ~value if predicate.startswith("!") else value
                if not self.active.any():
                    continue
            if op.startswith("bra"):
                if not self.active.all():
                    raise NotImplementedError("divergent branch")
                at = labels[args[0]]
            elif op.startswith(("ret", "exit")):
                return steps
            elif op.startswith(("bar.", "membar", "fence", "griddep", "setmaxnreg")):
                continue
            elif op.startswith("ld.param"):
                self.write(args[0], self.params[args[1].strip("[]")])
            elif op.startswith(("ldmatrix", "mma", "shfl", "ld.", "st.", "cp.async")):
                name = {
                    "ldmatrix": "ldmatrix",
                    "mma": "mma",
                    "shfl": "shuffle",
                    "ld": "load",
                    "st": "store",
                    "cp": "copy",
                }[op.split(".")[0]]
                getattr(self, name)(op, *args)
            elif op.startswith("cvta"):
                self.write(args[0], self.bits(args[1], 64))
            else:
                self.alu(op, args)
        return steps


def run(ptx, grid, args, shared):
    """Execute the kernel for every block of `grid`; returns how many instructions that took."""
    params, threads, code, labels = parse(ptx)
    # A view's pointer is inside of its storage: place whole storages, each once.
    storages = {}
    for arg in args:
        if isinstance(arg, torch.Tensor):
            storage = arg.untyped_storage()
            storages[storage.data_ptr()] = bytes_of(storage).copy(), storage
    offsets, size = {}, 256
    for pointer, (data, _) in storages.items():
        offsets[pointer] = size
        size += (len(data) + 511) // 256 * 256
    heap = np.full(size, 0xFF, np.uint8)
    for pointer, (data, _) in storages.items():
        heap[offsets[pointer] :][: len(data)] = data
    values = {}
    for (kind, name), arg in zip(params, [*args, *[0] * (len(params) - len(args))], strict=True):
        raw = arg
        if isinstance(arg, torch.Tensor):
            start = arg.untyped_storage().data_ptr()
            raw = BASE + offsets[start] + arg.storage_offset() * arg.element_size()
        elif kind == "f32":
            raw = struct.unpack("<I", struct.pack("<f", arg))[0]
        width = int(kind[1:])
        values[name] = UNSIGNED[width](int(raw) & ((1 << width) - 1))
    grid = (*grid, 1, 1)[:3]
    steps = 0
    with np.errstate(all="ignore"):
        for place in np.ndindex(*grid[::-1]):
            block = Block(threads, place[::-1], grid, heap, shared, values)
            steps += block.execute(code, labels)
    for pointer, (data, storage) in storages.items():
        changed = heap[offsets[pointer] :][: len(data)]
        if not np.array_equal(changed, data):
            bytes_of(storage)[:] = changed
    return steps


def bytes_of(storage):
    """A NumPy view of a storage's bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
