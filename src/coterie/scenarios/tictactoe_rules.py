"""Tic-tac-toe, as the player to move sees it, and how it is played perfectly.

A board is nine cells, row by row: free, own (of the player to move), or the other's. After a move the sides are
swapped, so the winner of a finished board is always "the other". Boards that are equal up to rotation and reflection
have one representative, the least of the eight.

    value(board) = 0 if the other has three in a line, 1/2 if no cell is free,
                   else 1 - min over free cells of value(board after the move)             (minimax)
"""

from __future__ import annotations

from functools import cache
from typing import Final

FREE: Final = 0
OWN: Final = 1
OTHER: Final = 2

Board = tuple[int, ...]
"""Nine cells: FREE, OWN or OTHER."""

EMPTY: Final[Board] = (FREE,) * 9

LINES: Final = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


def _symmetries() -> tuple[tuple[int, ...], ...]:
    """The cells in the eight orders that keep the lines."""
    turned = tuple(range(9))
    found = []
    for _ in range(4):
        turned = tuple(turned[3 * (2 - column) + row] for row in range(3) for column in range(3))
        found += [turned, tuple(turned[3 * row + 2 - column] for row in range(3) for column in range(3))]
    return tuple(found)


SYMMETRIES: Final = _symmetries()


def after(board: Board, cell: int) -> Board:
    """The board as the next player sees it. The cell must be free."""
    swapped = [(FREE, OTHER, OWN)[mark] for mark in board]
    swapped[cell] = OTHER
    return tuple(swapped)


def free(board: Board) -> tuple[int, ...]:
    """The cells that can be taken, in order."""
    return tuple(cell for cell, mark in enumerate(board) if mark == FREE)


def lost(board: Board) -> bool:
    """Whether the other has three in a line."""
    return any(all(board[cell] == OTHER for cell in line) for line in LINES)


def over(board: Board) -> bool:
    return lost(board) or FREE not in board


@cache
def representative(board: Board) -> Board:
    """The least of the boards that are equal to this one up to rotation and reflection."""
    return min(tuple(board[cell] for cell in order) for order in SYMMETRIES)


@cache
def value(board: Board) -> float:
    """What the player to move gets when both play perfectly: 1 a win, 0.5 a draw, 0 a loss."""
    if lost(board):
        return 0.0
    if FREE not in board:
        return 0.5
    return 1.0 - min(value(after(board, cell)) for cell in free(board))


@cache
def best_moves(board: Board) -> tuple[int, ...]:
    """All moves that keep the value of a board that is not over."""
    return tuple(cell for cell in free(board) if 1.0 - value(after(board, cell)) == value(board))
