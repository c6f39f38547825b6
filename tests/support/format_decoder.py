"""A second decoder of .air files: plain Python, slow, written from docs/format.md alone.

It shares no code with the package. What both decode alike is what the page says.
"""

import math
import struct
import zlib
from fractions import Fraction

NAMES = ["Y", "R", "B", "scale", "ratio", "turn", "layer", "count"]


def near(value: float) -> int:
    return math.floor(value + 0.5)


def within(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))


def bits(value: int) -> int:
    return abs(value).bit_length()


def half(value: int) -> int:
    return bits(value) >> 1


def sign(value: int) -> int:
    return (value > 0) - (value < 0)


def same(first: int, second: int) -> int:
    return 1 + sign(first) * sign(second)


SQUASH = {level: within(near(4096 / (1 + 2 ** (-level / 128))), 1, 4095) for level in range(-1535, 1536)}
Q = [near(256 * 4 ** (j / 64)) for j in range(768)]
E = [max(q - 512 + 65536 // q, 0) for q in Q]
S = [near(4096 * 4 ** (j / 64 - 3)) for j in range(768)]
K = [near(4096 * math.cos(math.pi * j / 256) ** 2) for j in range(256)]
T = [near(2 ** (20 + j / 64)) for j in range(768)]
A = [near(2 ** (40 - j / 128)) for j in range(1536)]


class Reader:
    """Sections 3 and 4: decisions, and numbers made of them."""

    def __init__(self) -> None:
        self.logits: dict[tuple[int, int, int, int], int] = {}
        self.gaussians = 0

    def start(self, payload: bytes) -> None:
        self.payload = payload
        self.place = 0
        self.span, self.code = 2**56, self.next_bytes(7)
        self.raw_bits = 0

    def next_bytes(self, number: int) -> int:
        found = self.payload[self.place : self.place + number]
        self.place += number
        return int.from_bytes(found.ljust(number, bytes(1)), "big")

    def decision(self, kind: int, contexts: tuple[int, ...], node: int) -> int:
        assert all(0 <= context < 32 for context in contexts), (kind, contexts)
        assert len(contexts) in (0, 3)
        assert 0 <= node < 64
        places = [(t, kind, context, node) for t, context in enumerate(contexts)] + [(3, kind, 0, node)]
        logit = sum(self.logits.get(place, 0) for place in places)
        chance = SQUASH[within(logit >> 12, -1535, 1535)]
        bound = (self.span >> 12) * chance
        bit = int(self.code < bound)
        if bit:
            self.span = bound
        else:
            self.code -= bound
            self.span -= bound
        if self.span < 2**24:
            self.span *= 2**32
            self.code = self.code * 2**32 + self.next_bytes(4)
        for place in places:
            moved = self.logits.get(place, 0) + (4096 * bit - chance) * (12 + 6144 // (256 + self.gaussians))
            self.logits[place] = (moved + 2**31) % 2**32 - 2**31
        return bit

    def raw(self, size: int) -> int:
        value = 0
        for i in range(size):
            byte, bit = divmod(self.raw_bits, 8)
            self.raw_bits += 1
            if byte < len(self.payload):
                value += (self.payload[-1 - byte] >> bit & 1) << i
        return value

    def flag(self, kind: int, contexts: tuple[int, int, int], node: int) -> int:
        return self.decision(kind, contexts, node)

    def tree(self, kind: int, contexts: tuple[int, ...], size: int, modelled: int, zeros: int = 0) -> int:
        value = 0
        for i in range(zeros, min(size, modelled)):
            value = 2 * value + self.decision(kind, contexts, 2**i + value)
        rest = size - max(zeros, min(size, modelled))
        return (value << rest) + self.raw(rest)

    def magnitude(self, kind: int, contexts: tuple[int, int, int]) -> int:
        length = 0
        while self.decision(kind, contexts, length):
            length += 1
            if length == 20:
                break
        if length == 0:
            return 0
        if length == 1:
            return 1
        value = 2 + self.decision(kind, contexts, 20 + length)
        return (value << (length - 2)) + self.raw(length - 2)

    def signed(self, kind: int, contexts: tuple, given: int, sign_contexts: tuple) -> int:
        value = self.magnitude(kind, contexts)
        if value == 0:
            return 0
        expected = -1 if given < 0 else 1
        return -expected * value if self.flag(kind, sign_contexts, 63) else expected * value


class File:
    """Sections 1 and 2: the header, and the payloads."""

    def __init__(self, data: bytes) -> None:
        assert data[:4] == bytes.fromhex("89414952")
        version, self.kind, stages, options = data[4:8]
        assert (version, options) == (1, 0)
        self.height, self.width, self.patch, self.low, self.span = struct.unpack("<IIHiI", data[8:26])
        end = 26 + (10 if self.kind else 72)
        if self.kind:
            self.step, self.ws, self.wa, self.wp = struct.unpack("<IHHH", data[26:end])
        else:
            self.channels = [struct.unpack("<BiI", data[26 + 9 * k : 35 + 9 * k]) for k in range(8)]
        checksum = zlib.crc32(data[:end])
        assert struct.unpack("<I", data[end : end + 4])[0] == checksum
        self.rows, self.columns = -(-self.height // self.patch), -(-self.width // self.patch)
        place = end + 4
        self.sections = []
        for _ in range(stages):
            start = place
            numbers = []
            for _ in range(2):
                number = shift = 0
                while True:
                    byte = data[place]
                    place += 1
                    number += (byte & 127) << shift
                    shift += 7
                    if byte < 128:
                        break
                numbers.append(number)
            payload = data[place : place + numbers[1]]
            place += numbers[1]
            checksum = zlib.crc32(data[start:place], checksum)
            assert struct.unpack("<I", data[place : place + 4])[0] == checksum
            place += 4
            self.sections.append((numbers[0], payload))
        assert place == len(data)

    def gaussians(self) -> list[list[tuple[int, list[float]]]]:
        """Per stage (patch, [x, y, s1, s2, angle, red, green, blue]), float64."""
        reader = Reader()
        memory = [dict.fromkeys(NAMES, 0) for _ in range(self.rows * self.columns)]
        result = []
        for s, (count, payload) in enumerate(self.sections):
            reader.start(payload)
            nested = bool(reader.raw(1)) if s else False
            stage = []
            for patch in range(self.rows * self.columns):
                values = self.one(reader, memory, s, nested, patch)
                if values is not None:
                    stage.append((patch, values))
                    reader.gaussians += 1
            assert len(stage) == count
            result.append(stage)
        return result

    def one(self, reader: Reader, memory: list[dict[str, int]], s: int, nested: bool, patch: int) -> list[float] | None:
        """Section 5: the mask of a patch, and its Gaussian if there is one."""
        row, column = divmod(patch, self.columns)
        nothing = dict.fromkeys(NAMES, 0)

        def at(down: int, right: int) -> dict[str, int]:
            r, c = row + down, column + right
            return memory[r * self.columns + c] if 0 <= r < self.rows and 0 <= c < self.columns else nothing

        own, a, b, c, d, e, f = (at(*where) for where in ((0, 0), (0, -1), (-1, 0), (-1, -1), (-1, 1), (0, 1), (1, 0)))
        held = min(own["count"], 3)
        before = int(s > 0 and own["layer"] == s)
        if nested and not before:
            return None
        around = 2 * a["count"] + 2 * b["count"] + c["count"] + d["count"] + e["count"] + f["count"]
        now = s + 1
        mask = reader.flag(
            8,
            (
                (a["layer"] == now) + 2 * (b["layer"] == now) + 4 * before + 8 * min(s, 3),
                (c["layer"] == now) + 2 * (d["layer"] == now) + 4 * (e["layer"] == s) + 8 * held,
                min(around, 15) + 16 * before,
            ),
            0,
        )
        if not mask:
            return None
        luma, cr, cb = self.strengths(reader, own, a, b, held, s)
        energy = min(6 * luma**2 + 5 * cr**2 + 7 * cb**2, 2**26)
        strength = min(bits(energy) >> 1, 15)
        around2 = (a["count"] > 0) + (b["count"] > 0)
        mean_scale = (a["scale"] + b["scale"]) // max(around2, 1)
        mean_ratio = (a["ratio"] + b["ratio"]) // max(around2, 1)
        by_sensitivity = self.kind == 1
        sb = min(half(energy * self.ws >> 8), 6) if by_sensitivity else 0
        st = sb + 4 if by_sensitivity else self.channels[2][0]
        rt = sb + 4 if by_sensitivity else self.channels[3][0]
        log_scale = reader.tree(
            3, (sb + 8 * min(s, 3), min(mean_scale >> 5, 23) if around2 else 24, strength + 16 * (held > 0)), st, 6
        )
        scale = log_scale * 2 ** (6 - sb) if by_sensitivity else 768 * log_scale >> st
        log_ratio = reader.tree(
            4,
            (
                sb + 8 * within((scale >> 6) - 2, 0, 3),
                min(mean_ratio >> 4, 7) + 8 * min(strength >> 1, 3),
                min(scale >> 5, 23),
            ),
            rt,
            6,
            st - bits(log_scale) if by_sensitivity else 0,
        )
        ratio = log_ratio * 2 ** (6 - sb) if by_sensitivity else 768 * log_ratio >> rt
        ab = min(half((energy * self.wa >> 8) * E[ratio] >> 8), 8) if by_sensitivity else self.channels[4][0]
        angle = reader.tree(
            5,
            (
                3 * min(ab, 9) + min(ratio >> 5, 2),
                (a["turn"] >> 5) + 8 * min(a["ratio"] >> 5, 3),
                (b["turn"] >> 5) + 8 * min(b["ratio"] >> 5, 3),
            ),
            ab,
            5,
        )
        turn = 256 * angle >> ab
        xb = yb = 0
        if by_sensitivity:
            spread = (Q[ratio] * K[turn] + ((4096 - K[turn]) << 8)) >> 12
            across = max(S[scale - ratio] * spread >> 8, 1)
            along = max(S[scale] * 256 // spread, 1)
            xb = within(half(energy * self.wp * 4096 // across) - 4, -4, 6)
            yb = within(half(energy * self.wp * 4096 // along) - 4, -4, 6)
            xc, yc = -(-self.span // 2 ** (6 - xb)), -(-self.span // 2 ** (6 - yb))
        else:
            xc, yc = 2 ** self.channels[0][0], 2 ** self.channels[1][0]
        x_symbol = reader.tree(6, (), bits(xc - 1), 5)
        y_symbol = reader.tree(7, (), bits(yc - 1), 5)
        own.update(
            layer=now,
            count=min(own["count"] + 1, 255),
            Y=within(luma, -32767, 32767),
            R=within(cr, -32767, 32767),
            B=within(cb, -32767, 32767),
            scale=scale,
            ratio=ratio,
            turn=turn,
        )
        if by_sensitivity:
            return self.by_sensitivity(row, column, (x_symbol, xb), (y_symbol, yb), scale, ratio, turn, (luma, cr, cb))
        return self.uniform(row, column, [x_symbol, y_symbol, log_scale, log_ratio, angle, luma, cr, cb])

    def strengths(self, reader: Reader, own: dict, a: dict, b: dict, held: int, s: int) -> tuple[int, int, int]:
        """Section 5: luma, Cr and Cb of a Gaussian; `own` is its patch, `a` that to the left, `b` the one above."""
        luma = reader.signed(
            0,
            (
                min(bits(own["Y"]), 7) + 8 * held,
                min((bits(a["Y"]) + bits(b["Y"]) + 1) >> 1, 15) + 16 * (s > 0),
                min(bits(a["Y"]), 7) + 8 * min(s, 3),
            ),
            1,
            (9 * sign(a["Y"]) + 3 * sign(b["Y"]) + sign(own["Y"]) + 13, 27, 28 + min(s, 3)),
        )
        strong = bits(luma)
        m = (bits(a["R"]) + bits(b["R"]) + 1) >> 1
        cr = reader.signed(
            1,
            (
                min(strong, 7) + 8 * min(m, 3),
                min(m, 7) + 8 * min(bits(own["R"]), 3),
                min(strong, 15) + 16 * (s > 0),
            ),
            luma,
            (9 * same(a["Y"], a["R"]) + 3 * same(b["Y"], b["R"]) + same(own["Y"], own["R"]), 27, 28),
        )
        m = (bits(a["B"]) + bits(b["B"]) + 1) >> 1
        cb = reader.signed(
            2,
            (
                min(strong, 7) + 8 * min(m, 3),
                min(m, 7) + 8 * min(bits(own["B"]), 3),
                min(bits(cr), 7) + 8 * min(strong >> 1, 3),
            ),
            luma,
            (9 * same(a["Y"], a["B"]) + 3 * same(b["Y"], b["B"]) + same(own["Y"], own["B"]), 27 + same(luma, cr), 30),
        )
        return luma, cr, cb

    def by_sensitivity(self, row, column, x, y, scale, ratio, turn, strengths) -> list[float]:
        """Section 6, quantiser 1."""
        xy = []
        for index, (symbol, fine) in ((column, x), (row, y)):
            width = 2 ** (6 - fine)
            exact = Fraction(2 * (64 * self.patch * index - 32 + self.low + symbol * width) + width, 128)
            xy.append(float(exact))
        k = A[2 * scale - ratio] / 2**37
        luma, cr, cb = (value * self.step / 65536 * k for value in strengths)
        return [
            *xy,
            T[scale] / 2**23,
            T[scale - ratio] / 2**23,
            turn / 256 * 3.141592653589793,
            luma + 1.402 * cr,
            luma - 0.714136286201022 * cr - 0.344136286201022 * cb,
            luma + 1.772 * cb,
        ]

    def uniform(self, row: int, column: int, symbols: list[int]) -> list[float]:
        """Section 6, quantiser 0."""
        values = []
        for index, (symbol, (size, low, step)) in enumerate(zip(symbols, self.channels, strict=True)):
            level = symbol
            if index >= 5:
                level += within((step - 2 * low) // (2 * step), 0, 2**size - 1)
            assert 0 <= level < 2**size
            values.append((low + level * step) / 2**20)
        x, y, s1, s2, angle, luma, cr, cb = values
        middle = (self.patch - 1) / 2
        red = luma + 1.402 * cr
        blue = luma + 1.772 * cb
        return [
            min(self.patch * column + middle, self.width - 1) + x,
            min(self.patch * row + middle, self.height - 1) + y,
            s1,
            s2,
            angle,
            red,
            (luma - 0.299 * red - 0.114 * blue) / 0.587,
            blue,
        ]
