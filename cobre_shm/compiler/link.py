"""From an object file of LLVM to an image: what a linker does, for code that needs little of one.

The code is position independent and has no data that could be written: it refers to constants
relative to its own place, and to functions that are elsewhere. For each of the latter there is a
word in a table behind the code, and a jump through it for calls that want a function to be near.
Anything else is an error.

Formats: ELF-64 (System V gABI, chapters 4 and 5) and its supplement for AMD64, section 4.4.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import NamedTuple

from cobre_shm.native.image import PAGE_BYTES, WORD_BYTES, Image

__all__ = ["link"]

_HEADER = struct.Struct("<40xQ10xHHH")
_RELOCATION = struct.Struct("<QIIq")
_OFFSET = struct.Struct("<i")
_PROGRAM_DATA, _SYMBOLS, _RELOCATIONS = 1, 2, 4
_WRITABLE, _ALLOCATED = 0x1, 0x2
_UNDEFINED = 0
# R_X86_64_PC32, PLT32: the distance to a symbol. GOTPCREL, GOTPCRELX, REX_GOTPCRELX: the distance
# to a word with its address.
_TO_SYMBOL, _TO_WORD = (2, 4), (9, 41, 42)
_JUMP = b"\xff\x25"  # jmp *offset(%rip)
_JUMP_BYTES, _JUMP_ROOM = 6, 8


class _Section(NamedTuple):
    name: str
    kind: int
    flags: int
    content: bytes
    link: int
    info: int
    alignment: int


class _Symbol(NamedTuple):
    name: str
    section: int
    value: int


class _Reference(NamedTuple):
    """At ``place`` stands ``addend`` plus the distance from there to a symbol or its word."""

    place: int
    kind: int
    symbol: _Symbol
    addend: int


def link(code: bytes, names: Collection[str]) -> Image:
    """Make an image of an object file.

    Args:
        code: The file.
        names: Of the functions that the image offers.

    Raises:
        ValueError: The code needs what an image has not.
    """
    sections = _sections(code)
    symbols = _symbols(sections)
    laid = bytearray()
    places: dict[int, int] = {}
    for number, section in enumerate(sections):
        # Nobody unwinds kernels.
        is_code = section.flags & (_ALLOCATED | _WRITABLE) == _ALLOCATED
        if is_code and section.kind == _PROGRAM_DATA and section.name != ".eh_frame":
            laid += bytes(-len(laid) % section.alignment)
            places[number] = len(laid)
            laid += section.content
    references = _references(sections, symbols, places)
    outside = {each.symbol.name for each in references if each.symbol.section == _UNDEFINED}
    externals = sorted(outside)
    jumps = len(laid) + -len(laid) % _JUMP_ROOM
    table = -(-(jumps + len(externals) * _JUMP_ROOM) // PAGE_BYTES) * PAGE_BYTES
    laid += bytes(table - len(laid))
    for i in range(len(externals)):
        jump, word = jumps + i * _JUMP_ROOM, table + i * WORD_BYTES
        laid[jump : jump + _JUMP_BYTES] = _JUMP + _OFFSET.pack(word - jump - _JUMP_BYTES)
    for place, kind, symbol, addend in references:
        if symbol.section in places and kind in _TO_SYMBOL:
            target = places[symbol.section] + symbol.value
        elif symbol.section == _UNDEFINED and kind in _TO_SYMBOL:
            target = jumps + externals.index(symbol.name) * _JUMP_ROOM
        elif symbol.section == _UNDEFINED and kind in _TO_WORD:
            target = table + externals.index(symbol.name) * WORD_BYTES
        else:
            raise ValueError(f"reference of kind {kind} to {symbol}")
        _OFFSET.pack_into(laid, place, target + addend - place)
    entries = {
        each.name: places[each.section] + each.value for each in symbols if each.name in names
    }
    return Image(entries, tuple(externals), bytes(laid))


def _sections(code: bytes) -> list[_Section]:
    start, size, count, names_at = _HEADER.unpack_from(code)
    heads = [struct.unpack_from("<IIQQQQIIQQ", code, start + i * size) for i in range(count)]
    names_start = heads[names_at][4]
    return [
        _Section(
            _text(code, names_start + name),
            kind,
            flags,
            code[offset : offset + nbytes],
            link,
            info,
            max(1, alignment),
        )
        for name, kind, flags, _, offset, nbytes, link, info, alignment, _ in heads
    ]


def _symbols(sections: list[_Section]) -> list[_Symbol]:
    table = next(each for each in sections if each.kind == _SYMBOLS)
    names = sections[table.link].content
    found = struct.iter_unpack("<IBBHQQ", table.content)
    return [_Symbol(_text(names, name), section, value) for name, _, _, section, value, _ in found]


def _references(
    sections: list[_Section], symbols: list[_Symbol], places: dict[int, int]
) -> list[_Reference]:
    return [
        _Reference(places[section.info] + offset, kind, symbols[symbol], addend)
        for section in sections
        if section.kind == _RELOCATIONS and section.info in places
        for offset, kind, symbol, addend in _RELOCATION.iter_unpack(section.content)
    ]


def _text(content: bytes, start: int) -> str:
    return content[start : content.index(b"\0", start)].decode()
