"""``foretoken demo``: two real models decode speculatively before your eyes; a table says what it brought.

`command` reads the options and runs the parts: `models` loads, `live` shows one text as it is decoded,
`methods` are the ways to decode that are compared (`byhand` is a loop written without foretoken), `compare`
runs them by turns, `checks` holds the figures against their bounds, `report` and `plot` show them.
"""

from __future__ import annotations

from foretoken.demo.command import add_command

__all__ = ["add_command"]
